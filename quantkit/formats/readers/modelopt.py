"""ModelOpt's checkpoints, NVIDIA's and quantkit's own: see `quantkit.formats.modelopt.layout`."""

from __future__ import annotations

from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ArtifactError
from quantkit.formats.layouts import SCALE, WEIGHT
from quantkit.formats.modelopt.layout import (
    AWQ,
    FP8,
    PARTS,
    PRE_QUANT_SCALE,
    SCHEME_OF,
    decode_layer,
    part_dtypes,
    part_shapes,
)
from quantkit.formats.readers.description import StoredQuantization
from quantkit.formats.readers.layers import (
    StoredLayer,
    find_parts,
    read_part,
    refuse_groups,
    show_parts,
)
from quantkit.numerics.affine import dequantize_layer
from quantkit.records import QuantizedLayer
from quantkit.schemes import SCHEMES

_OPTIONAL = (PRE_QUANT_SCALE,)


def find_modelopt_layer(
    checkpoint: Checkpoint, quantization: StoredQuantization, name: str
) -> StoredLayer:
    """Find out a layer's shape and groups from the headers.

    Raises:
        ArtifactError: a tensor is missing, or the tensors do not fit each other or the algorithm.
    """
    algorithm = quantization.algorithm
    parts = find_parts(checkpoint.tensors, name, PARTS)
    if WEIGHT not in parts or len(parts[WEIGHT].shape) != 2 or not parts[WEIGHT].size:
        raise ArtifactError(f"layer {name} is stored as {show_parts(parts)}: not as a matrix")
    rows, columns = parts[WEIGHT].shape
    rows *= 2 if algorithm == AWQ else 1
    size = None
    if algorithm == AWQ:
        size = _find_group_size(name, checkpoint, quantization, columns)
    expected, dtypes = part_shapes(algorithm, rows, columns, size), part_dtypes(algorithm)
    missing = [part for part in expected if part not in parts and part not in _OPTIONAL]
    if missing:
        raise ArtifactError(f"layer {name} has no {' and no '.join(missing)}")
    # One number may be stored as [] or as [1].
    fits = all(
        part in expected
        and (info.shape or (1,)) == (expected[part] or (1,))
        and info.dtype in dtypes[part]
        for part, info in parts.items()
    )
    if not fits:
        raise ArtifactError(
            f"layer {name} is stored as {show_parts(parts)}: not as {algorithm}, which "
            f"{quantization.where} describes"
        )
    return StoredLayer(
        name=name,
        shape=(rows, columns),
        bits=SCHEMES[SCHEME_OF[algorithm]].weight_bits,
        group_size=size,
        sharing="group" if algorithm == AWQ else "tensor" if algorithm == FP8 else "channel",
        symmetric=True,
        scheme=SCHEME_OF[algorithm],
        parts={part: info.name for part, info in parts.items()},
    )


def _find_group_size(
    name: str, checkpoint: Checkpoint, quantization: StoredQuantization, columns: int
) -> int:
    """Return the columns that share a scale; what the description leaves out the scales tell."""
    scale = checkpoint.tensors.get(f"{name}.{SCALE}")
    groups = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 1
    size = quantization.group_size or columns // max(groups, 1)
    if groups * size != columns:
        raise refuse_groups(name, groups, columns, quantization)
    return size


def read_modelopt_layer(
    checkpoint: Checkpoint, quantization: StoredQuantization, layer: StoredLayer
) -> QuantizedLayer:
    """Read a layer's codes and scales, as they are.

    Raises:
        ArtifactError: a tensor is damaged, or the layer's inputs are scaled before they meet it,
            which the record has no place for.
    """
    scale = _read_input_factor(checkpoint, layer)
    if scale is not None:
        raise ArtifactError(
            f"layer {layer.name} has a {PRE_QUANT_SCALE} that is not 1: only convert --to "
            f"safetensors can take it in"
        )
    return _decode(checkpoint, quantization, layer)


def read_modelopt_weight(
    checkpoint: Checkpoint, quantization: StoredQuantization, layer: StoredLayer
) -> Tensor:
    """Return the float32 weight [O, I], a `pre_quant_scale` taken in.

    Raises:
        ArtifactError: a tensor is damaged.
    """
    weight = dequantize_layer(_decode(checkpoint, quantization, layer))
    scale = _read_input_factor(checkpoint, layer)
    return weight if scale is None else weight.mul_(scale.float())


def scales_inputs(checkpoint: Checkpoint, layer: StoredLayer) -> bool:
    """Whether a layer's inputs are multiplied by something else than 1 first.

    Raises:
        ArtifactError: a tensor is damaged.
    """
    return _read_input_factor(checkpoint, layer) is not None


def _decode(
    checkpoint: Checkpoint, quantization: StoredQuantization, layer: StoredLayer
) -> QuantizedLayer:
    parts = {part: read_part(checkpoint, layer, part) for part in layer.parts}
    return decode_layer(layer.name, quantization.algorithm, layer.group_size, parts)


def _read_input_factor(checkpoint: Checkpoint, layer: StoredLayer) -> Tensor | None:
    """Return a layer's `pre_quant_scale` [I]; None where it has none or all of it is 1."""
    if PRE_QUANT_SCALE not in layer.parts:
        return None
    scale = read_part(checkpoint, layer, PRE_QUANT_SCALE)
    return None if bool((scale == 1).all()) else scale
