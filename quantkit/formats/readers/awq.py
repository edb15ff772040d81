"""AWQ's `gemm` layout.

In place of a layer's `weight` [O, I], with G groups along I, stand

    qweight  int32 [I, O / 8]   unsigned 4-bit codes, packed along O
    qzeros   int32 [G, O / 8]   unsigned zero points, packed alike; may lack in symmetric models
    scales   [G, O], float

and a weight is `scale * (code - zero)`. The eight values of a word are the columns 0 2 4 6 1 3 5 7,
lowest bits first. Written and read by AutoAWQ (modules/linear/gemm.py; utils/packing_utils.py),
GPTQModel (nn_modules/qlinear/torch_awq.py) and vLLM (quantization/auto_awq.py); all know 4 bits
only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ArtifactError
from quantkit.formats.readers.description import StoredQuantization
from quantkit.formats.readers.layers import (
    FLOATS,
    LayerCodes,
    StoredLayer,
    describe_codes,
    find_parts,
    read_part,
    refuse_groups,
    refuse_parts,
    show_parts,
)
from quantkit.numerics.affine import code_range
from quantkit.numerics.packing import unpack_rows

_PARTS = ("qweight", "qzeros", "scales")

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column within a word -> its place there: the inverse of 0 2 4 6 1 3 5 7."""


def find_awq_layer(
    checkpoint: Checkpoint, quantization: StoredQuantization, name: str
) -> StoredLayer:
    """Find out a layer's shape and groups from the headers.

    Raises:
        ArtifactError: a tensor is missing, or the tensors do not fit each other or the config.
    """
    parts = find_parts(checkpoint.tensors, name, _PARTS)
    needed = _PARTS if not quantization.symmetric else ("qweight", "scales")
    missing = [part for part in needed if part not in parts]
    if missing:
        raise ArtifactError(f"layer {name} has no {' and no '.join(missing)}")
    if any(len(info.shape) != 2 or not info.size for info in parts.values()):
        raise ArtifactError(f"layer {name} is stored as {show_parts(parts)}: not as AWQ is")
    bits, per_word = quantization.bits, 32 // quantization.bits
    columns, words = parts["qweight"].shape
    rows, groups = words * per_word, parts["scales"].shape[0]
    fits = (
        parts["qweight"].dtype == "I32"
        and parts["scales"].dtype in FLOATS
        and parts["scales"].shape == (groups, rows)
        and ("qzeros" not in parts or parts["qzeros"].dtype == "I32")
        and ("qzeros" not in parts or parts["qzeros"].shape == (groups, words))
    )
    if not fits:
        raise refuse_parts(name, parts, bits)
    if groups * (quantization.group_size or columns) != columns:
        raise refuse_groups(name, groups, columns, quantization)
    return describe_codes(name, (rows, columns), bits, quantization, parts)


def read_awq_codes(
    checkpoint: Checkpoint, quantization: StoredQuantization, layer: StoredLayer
) -> LayerCodes:
    """Read a layer's codes, scales and zero points.

    Raises:
        ArtifactError: a tensor is damaged, or its values contradict the config.
    """
    rows = layer.shape[0]
    codes = _unpack(read_part(checkpoint, layer, "qweight"), layer.bits, rows)
    scale = read_part(checkpoint, layer, "scales").T.contiguous()
    zero_point = None
    if "qzeros" in layer.parts:
        zero_point = _unpack(read_part(checkpoint, layer, "qzeros"), layer.bits, rows)
    if layer.symmetric and zero_point is not None:
        if bool((zero_point != 0).any()):
            raise ArtifactError(
                f"layer {layer.name} has zero points other than {-code_range(layer.bits)[0]}, but "
                f"{quantization.where} says that there are none (zero_point): its readers would "
                f"see different weights"
            )
        zero_point = None
    return LayerCodes(codes, scale, zero_point)


def _unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Unpack int32 [N, O / 8] to signed int8 [O, N]."""
    places = unpack_rows(packed, bits, rows).reshape(packed.shape[0], -1, len(_PLACES))
    order = torch.tensor(_PLACES)
    return places[:, :, order].reshape(packed.shape[0], rows).T.contiguous()
