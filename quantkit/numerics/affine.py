"""Codes and scales: `weight = scale * (code - zero_point)`.

Shapes: O output features, I input features, G groups of equal size along I. The conventions are
those of compressed-tensors: integer codes and zero points are signed, in
[-2**(bits-1), 2**(bits-1) - 1]; a symmetric scale is max|w| / ((2**bits - 1) / 2), so 7.5 steps for
four bits; an asymmetric range always includes zero; the scale of floating-point codes is
max|w| / 448. A scale is rounded to the dtype it is stored in before any code is chosen. Scales are
[O, G], or one for each block of 128 x 128 where the scheme is in blocks (`numerics/fp8.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.fp8 import (
    FP8,
    LARGEST,
    divide_blocks,
    fp8_steps,
    gather_blocks,
    multiply_blocks,
    round_to_fp8,
)
from quantkit.records import QuantizedLayer
from quantkit.schemes import BLOCK_SIZE, Scheme

CodeSet = Scheme | GgmlType
"""What says which values a code can stand for, in units of its scale."""


def code_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest integer code of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def integer_limits(scheme: CodeSet) -> tuple[int, int] | None:
    """Return the smallest and the largest code; None where codes are no evenly spaced integers."""
    if isinstance(scheme, GgmlType):
        return None if scheme.values else scheme.codes
    return None if scheme.weight_kind == "float" else code_range(scheme.weight_bits)


def group_columns(in_features: int, group_size: int | None) -> int:
    """Return the number of columns that share a scale; None means all of them.

    Raises:
        ValueError: `group_size` does not divide `in_features`.
    """
    if group_size is None:
        return in_features
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"a group size of {group_size} does not divide {in_features} columns")
    return group_size


def group_weights(weight: Tensor, scheme: Scheme, group_size: int | None) -> Tensor:
    """Return float32 [O, I] as [O, G, g], the weights that share a scale along the last axis.

    For the granularity `block` it is [ceil(O/128), ceil(I/128), 128 * 128], see `gather_blocks`.

    Raises:
        ValueError: `group_size` does not divide I.
    """
    if scheme.granularity == "block":
        return gather_blocks(weight)
    return weight.reshape(len(weight), -1, group_columns(weight.shape[1], group_size))


def round_scale(scale: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """Round positive scales to `scale_dtype` so that every weight they can express is finite.

    A scale of zero (an all-zero group) becomes 1: its codes are zeros, and no reader divides by
    zero. A scale too small for the dtype becomes the smallest that kernels do not flush to zero.

    Args:
        scale: float32, any shape, non-negative.

    Returns:
        The scales in `scale_dtype`, same shape.
    """
    limits = torch.finfo(scale_dtype)
    # float16 has useful subnormals; those of the wide dtypes are flushed by many kernels.
    smallest = limits.smallest_normal * (limits.eps if scale_dtype == torch.float16 else 1.0)
    # The margin keeps the bound itself from being rounded up.
    largest = limits.max / _largest_value(scheme) * (1 - limits.eps)
    rounded = scale.clamp(min=smallest, max=largest).to(scale_dtype)
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)


def _largest_value(scheme: Scheme) -> float:
    """Return the largest magnitude of a code less its zero point."""
    if scheme.weight_kind == "float":
        return LARGEST
    return 1 << (scheme.weight_bits - 1) if scheme.symmetric else (1 << scheme.weight_bits) - 1


def choose_absmax(
    weight: Tensor, scheme: Scheme, group_size: int | None, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Choose scales (and zero points) from the extremes of each group or block.

    Args:
        weight: float32 [O, I].

    Returns:
        scale in `scale_dtype`, [O, G] or [ceil(O/128), ceil(I/128)] for blocks, and zero_point
        int8 [O, G], or None for symmetric schemes.

    Raises:
        ValueError: `group_size` does not divide I.
    """
    return choose_group_absmax(group_weights(weight, scheme, group_size), scheme, scale_dtype)


def choose_group_absmax(
    grouped: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`choose_absmax` for weights [O, G, g] that share a scale along the last axis."""
    if scheme.symmetric:
        whole_range = scheme.weight_kind == "int"
        steps = ((1 << scheme.weight_bits) - 1) / 2 if whole_range else LARGEST
        largest = torch.maximum(grouped.amax(dim=2), -grouped.amin(dim=2))
        return round_scale(largest / steps, scheme, scale_dtype), None
    steps = (1 << scheme.weight_bits) - 1
    low = grouped.amin(dim=2).clamp(max=0.0)
    high = grouped.amax(dim=2).clamp(min=0.0)
    # Divided before subtracted: the difference of two huge weights would overflow.
    scale = round_scale(high / steps - low / steps, scheme, scale_dtype)
    return scale, choose_zero_point(low, scale, scheme)


def choose_zero_point(low: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return the int8 zero points [O, G] that map `low` [O, G] nearest to the smallest code."""
    smallest, largest = code_range(scheme.weight_bits)
    zero_point = torch.round(smallest - low / scale.float())
    return zero_point.clamp_(smallest, largest).to(torch.int8)


def round_values(values: Tensor, scheme: CodeSet, zero_point: Tensor | None) -> Tensor:
    """Round weights in units of their scale to the nearest that a code stands for, in place.

    Args:
        values: float32, any shape.
        zero_point: float32 that broadcasts to `values`, or None; None for a ggml type.

    Returns:
        `values`: codes less zero points.
    """
    if isinstance(scheme, GgmlType):
        return _round_to_ggml(values, scheme)
    if scheme.weight_kind == "float":
        return round_to_fp8(values)
    smallest, largest = code_range(scheme.weight_bits)
    values.round_()
    if zero_point is None:
        return values.clamp_(smallest, largest)
    return values.clamp_(smallest - zero_point, largest - zero_point)


def _round_to_ggml(values: Tensor, kind: GgmlType) -> Tensor:
    if not kind.values:
        return values.round_().clamp_(*kind.codes)
    table = torch.tensor(kind.values, dtype=values.dtype, device=values.device)
    return values.copy_(table[torch.bucketize(values, (table[1:] + table[:-1]) / 2)])


def round_second(
    values: Tensor, nearest: Tensor, scheme: CodeSet, zero_point: Tensor | None
) -> Tensor:
    """Return the second nearest values that a code stands for; the nearest where there is none.

    Args:
        values: float32, any shape; zero_point: float32 that broadcasts to it, or None.
        nearest: what `round_values` makes of them.
    """
    side = torch.sign(values - nearest)
    if isinstance(scheme, GgmlType):
        if not scheme.values:
            return side.add_(nearest).clamp_(*scheme.codes)
        table = torch.tensor(scheme.values, dtype=values.dtype, device=values.device)
        place = torch.searchsorted(table, nearest).add_(side.long())
        return table[place.clamp_(0, len(table) - 1)]
    if scheme.weight_kind == "float":
        return side.mul_(fp8_steps(values)).add_(nearest).clamp_(-LARGEST, LARGEST)
    smallest, largest = code_range(scheme.weight_bits)
    side += nearest
    if zero_point is None:
        return side.clamp_(smallest, largest)
    return side.clamp_(smallest - zero_point, largest - zero_point)


def code_dtype(scheme: CodeSet) -> torch.dtype:
    """Return the dtype of the codes of a scheme or ggml type; either has one byte."""
    if isinstance(scheme, GgmlType):
        return torch.int8
    return FP8 if scheme.weight_kind == "float" else torch.int8


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Round every weight to its nearest code under the given scales.

    Args:
        weight: float32 [O, I].
        scale: as `scheme` shapes it, any float dtype: [O, G] with G a divisor of I, or
            [ceil(O/128), ceil(I/128)] for blocks.
        zero_point: int8 [O, G] or None.

    Returns:
        codes [O, I], int8 or float8_e4m3fn.
    """
    if scheme.granularity == "block":
        return round_to_fp8(divide_blocks(weight.clone(), scale)).to(FP8)
    values = weight.reshape(*scale.shape, -1) / scale.float().unsqueeze(2)
    offset = None if zero_point is None else zero_point.float().unsqueeze(2)
    round_values(values, scheme, offset)
    if offset is not None:
        values += offset
    return values.to(code_dtype(scheme)).reshape(weight.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return the float32 weights [O, I] of codes [O, I]; scale and zero_point are [O, G]."""
    values = codes.reshape(*scale.shape, -1).float()
    if zero_point is not None:
        values -= zero_point.float().unsqueeze(2)
    values *= scale.float().unsqueeze(2)
    return values.reshape(codes.shape)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Return the float32 weights [O, I] of codes [O, I] under scales as `scheme` shapes them."""
    if scheme.granularity == "block":
        return multiply_blocks(codes.float(), scale)
    return dequantize(codes, scale, zero_point)


def dequantize_layer(layer: QuantizedLayer) -> Tensor:
    """Return the float32 weights [O, I] of a quantized layer of any scheme."""
    return decode(layer.codes, layer.scale, layer.zero_point, layer.scheme)


def relative_steps(scale: Tensor, unit: Tensor) -> Tensor:
    """Return float32 scales divided by the units of their rows; never zero, so that it divides."""
    steps = scale.float() / unit
    least = torch.finfo(torch.float32).smallest_normal
    # The scales of ggml types have a sign.
    return steps.masked_fill_(steps.abs() < least, least)


def row_units(weight: Tensor, scheme: CodeSet | None = None) -> Tensor:
    """Return powers of two [O, 1] near the largest |w| of each row of [O, I].

    Divided by them, which is exact for all that counts beside the largest, every row has a
    magnitude near 1: no loss overflows. Rows that share the scales of a `scheme` in blocks share
    their unit.
    """
    # Without a copy of the weight's size, which abs() would make.
    largest = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
    if isinstance(scheme, Scheme) and scheme.granularity == "block":
        parts = [part.amax().expand(len(part), 1) for part in largest.split(BLOCK_SIZE)]
        largest = torch.cat(parts)
    exponent = torch.frexp(largest).exponent
    return torch.exp2(exponent.clamp(-120, 120).float())
