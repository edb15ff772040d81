"""How `pack-quantized` of compressed-tensors 0.20 stores one quantized linear layer.

In place of a layer's `weight` [O, I], with G groups along I, stand

    weight_packed      int32 [O, ceil(I * bits / 32)]   codes, packed along I
    weight_scale       [O, G], float
    weight_shape       int64 [2]                        O and I
    weight_zero_point  int32 [ceil(O * bits / 32), G]   packed along O; asymmetric schemes only
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ArtifactError
from quantkit.formats.shards import TensorSpec
from quantkit.numerics.packing import pack_columns, pack_rows, unpack_columns, unpack_rows
from quantkit.records import LinearPlan, QuantizedLayer
from quantkit.schemes import SCHEMES, Scheme

PACKED, SCALE, SHAPE, ZERO_POINT = PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
)


@dataclass(frozen=True)
class PackedLayout:
    """What a reader must know of a packed layer."""

    bits: int
    symmetric: bool
    group_size: int | None
    """Columns that share a scale; None: one scale per row."""


def packed_shapes(layout: PackedLayout, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every part of a layer with weight [rows, columns]."""
    groups = 1 if layout.group_size is None else columns // layout.group_size
    shapes: dict[str, tuple[int, ...]] = {
        PACKED: (rows, math.ceil(columns * layout.bits / 32)),
        SCALE: (rows, groups),
        SHAPE: (2,),
    }
    if not layout.symmetric:
        shapes[ZERO_POINT] = (math.ceil(rows * layout.bits / 32), groups)
    return shapes


def specify_layer(linear: LinearPlan, scale_dtype: str) -> tuple[TensorSpec, ...]:
    """Announce the tensors of a planned layer; `scale_dtype` is safetensors' name of a dtype."""
    dtypes = {PACKED: "I32", SCALE: scale_dtype, SHAPE: "I64", ZERO_POINT: "I32"}
    scheme = linear.scheme
    layout = PackedLayout(scheme.weight_bits, scheme.symmetric, linear.group_size)
    shapes = packed_shapes(layout, linear.out_features, linear.in_features)
    return tuple(
        TensorSpec(f"{linear.name}.{part}", dtypes[part], shape) for part, shape in shapes.items()
    )


def encode_part(layer: QuantizedLayer, part: str) -> Tensor:
    """Return the tensor that is stored as `part` of a layer.

    Raises:
        ValueError: the layer has no such part.
    """
    bits = layer.scheme.weight_bits
    if part == PACKED:
        return pack_rows(layer.codes, bits)
    if part == SCALE:
        return layer.scale
    if part == SHAPE:
        return torch.tensor(layer.codes.shape, dtype=torch.int64)
    if part == ZERO_POINT and layer.zero_point is not None:
        return pack_columns(layer.zero_point, bits)
    raise ValueError(f"{layer.name} has no {part}")


def decode_layer(name: str, layout: PackedLayout, parts: Mapping[str, Tensor]) -> QuantizedLayer:
    """Rebuild a layer from its stored tensors, whose shapes fit `layout`.

    Args:
        name: full module name.
        layout: of the layer.
        parts: the tensors by part name.

    Raises:
        ArtifactError: quantkit has no scheme for the layout.
    """
    scheme = find_scheme(layout)
    if scheme is None:
        raise ArtifactError(f"layer {name} is stored as {layout}, which cannot be decoded yet")
    rows, columns = map(int, parts[SHAPE])
    zero_point = None
    if not layout.symmetric:
        zero_point = unpack_columns(parts[ZERO_POINT], layout.bits, rows)
    codes = unpack_rows(parts[PACKED], layout.bits, columns)
    return QuantizedLayer(name, scheme, layout.group_size, codes, parts[SCALE], zero_point)


def find_scheme(layout: PackedLayout) -> Scheme | None:
    """Return the weight-only integer scheme with such codes, or None where there is none."""
    for scheme in SCHEMES.values():
        kind = (scheme.weight_kind, scheme.grouped, scheme.weight_bits, scheme.symmetric)
        if kind == ("int", True, layout.bits, layout.symmetric):
            return scheme
    return None
