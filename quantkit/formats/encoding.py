"""The tensors of one quantized layer: announced, made from the record, and read back to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import ArtifactError
from quantkit.formats.layouts import (
    INPUT_SCALE,
    PACKED,
    SCALE,
    SHAPE,
    WEIGHT,
    ZERO_POINT,
    Layout,
    find_scheme,
    lay_out,
    name_scheme,
    part_dtypes,
    part_shapes,
)
from quantkit.formats.shards import TensorSpec
from quantkit.numerics.packing import pack_columns, pack_rows, unpack_columns, unpack_rows
from quantkit.records import LinearPlan, QuantizedLayer


def specify_layer(linear: LinearPlan, scale_dtype: str) -> tuple[TensorSpec, ...]:
    """Announce the tensors of a planned layer; `scale_dtype` is safetensors' name of a dtype."""
    layout = lay_out(linear.scheme, linear.group_size)
    dtypes = {part: found[0] for part, found in part_dtypes(layout).items()}
    dtypes |= {SCALE: scale_dtype, INPUT_SCALE: scale_dtype}
    shapes = part_shapes(layout, linear.out_features, linear.in_features)
    return tuple(
        TensorSpec(f"{linear.name}.{part}", dtypes[part], shape) for part, shape in shapes.items()
    )


def encode_part(layer: QuantizedLayer, part: str) -> Tensor:
    """Return the tensor that is stored as `part` of a layer.

    Raises:
        ValueError: the layer has no such part.
    """
    layout = lay_out(layer.scheme, layer.group_size)
    if part == PACKED and layout.packed:
        return pack_rows(layer.codes, layout.bits)
    if part == SHAPE and layout.packed:
        return torch.tensor(layer.codes.shape, dtype=torch.int64)
    if part == WEIGHT and not layout.packed:
        return layer.codes
    if part == SCALE:
        return layer.scale
    if part == ZERO_POINT and layer.zero_point is not None:
        return pack_columns(layer.zero_point, layout.bits) if layout.packed else layer.zero_point
    if part == INPUT_SCALE and layer.input_scale is not None:
        return layer.input_scale
    raise ValueError(f"{layer.name} has no {part}")


def decode_layer(name: str, layout: Layout, parts: Mapping[str, Tensor]) -> QuantizedLayer:
    """Rebuild a layer from its stored tensors, whose shapes fit `layout`.

    One scale a tensor becomes one a row: the record knows no other.

    Args:
        name: full module name.
        layout: of the layer.
        parts: the tensors by part name.

    Raises:
        ArtifactError: quantkit has no scheme for the layout.
    """
    scheme = find_scheme(layout)
    if scheme is None:
        raise ArtifactError(
            f"layer {name} is stored as {name_scheme(layout)}, for which quantkit has no scheme"
        )
    if layout.packed:
        rows, columns = map(int, parts[SHAPE])
        codes = unpack_rows(parts[PACKED], layout.bits, columns)
    else:
        codes = parts[WEIGHT]
        rows = len(codes)
    zero_point = None
    if not layout.symmetric:
        stored = parts[ZERO_POINT]
        zero_point = unpack_columns(stored, layout.bits, rows) if layout.packed else stored
    scale = parts[SCALE]
    if layout.strategy == "tensor":
        scale = scale.reshape(1, 1).repeat(rows, 1)
    group_size = layout.group_size if scheme.grouped else None
    return QuantizedLayer(
        name, scheme, group_size, codes, scale, zero_point, parts.get(INPUT_SCALE)
    )
