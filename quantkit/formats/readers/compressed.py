"""compressed-tensors layers, read by `quantkit.formats.decode`, in the terms of this package."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.config_groups import ConfigGroup
from quantkit.formats.decode import find_layout, read_stored_layer
from quantkit.formats.layouts import PARTS, name_scheme
from quantkit.formats.readers.layers import StoredLayer, find_parts
from quantkit.numerics.affine import dequantize_layer


def find_compressed_layer(
    checkpoint: Checkpoint, name: str, groups: Sequence[ConfigGroup]
) -> StoredLayer:
    """Find out a layer's shape, bits and groups; `groups` are those of the config.

    Raises:
        ArtifactError: a tensor is missing, or no group of config.json fits.
    """
    layout, shape = find_layout(checkpoint, name, groups)
    parts = find_parts(checkpoint.tensors, name, PARTS)
    return StoredLayer(
        name=name,
        shape=shape,
        bits=layout.bits,
        group_size=layout.group_size,
        sharing=layout.strategy,
        symmetric=layout.symmetric,
        scheme=name_scheme(layout),
        parts={part: info.name for part, info in parts.items()},
    )


def read_compressed_weight(checkpoint: Checkpoint, layer: StoredLayer) -> Tensor:
    """Return the float32 weight [O, I].

    Raises:
        ArtifactError: a tensor is damaged, or quantkit has no scheme for such codes.
    """
    return dequantize_layer(read_stored_layer(checkpoint, layer.name))
