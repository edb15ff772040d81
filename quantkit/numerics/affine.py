"""Affine integer codes: `weight = scale * (code - zero_point)`.

Shapes: O output features, I input features, G groups of equal size along I. The conventions are
those of compressed-tensors: signed codes and zero points in [-2**(bits-1), 2**(bits-1) - 1]; a
symmetric scale is max|w| / ((2**bits - 1) / 2), so 7.5 steps for four bits; an asymmetric range
always includes zero. A scale is rounded to the dtype it is stored in before any code is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.records import QuantizedLayer
from quantkit.schemes import Scheme


def code_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


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
    steps = 1 << (scheme.weight_bits - 1) if scheme.symmetric else (1 << scheme.weight_bits) - 1
    # The margin keeps the bound itself from being rounded up.
    largest = limits.max / steps * (1 - limits.eps)
    rounded = scale.clamp(min=smallest, max=largest).to(scale_dtype)
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)


def choose_absmax(
    weight: Tensor, scheme: Scheme, group_size: int | None, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Choose scales (and zero points) from the extremes of each group.

    Args:
        weight: float32 [O, I].

    Returns:
        scale [O, G] in `scale_dtype` and zero_point int8 [O, G], or None for symmetric schemes.

    Raises:
        ValueError: `group_size` does not divide I.
    """
    columns = group_columns(weight.shape[1], group_size)
    grouped = weight.reshape(weight.shape[0], -1, columns)
    steps = (1 << scheme.weight_bits) - 1
    if scheme.symmetric:
        scale = grouped.abs().amax(dim=2) / (steps / 2)
        return round_scale(scale, scheme, scale_dtype), None
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


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Round every weight to its nearest code under the given scales.

    Args:
        weight: float32 [O, I].
        scale: [O, G], any float dtype, with G a divisor of I.
        zero_point: int8 [O, G] or None.

    Returns:
        codes int8 [O, I].
    """
    smallest, largest = code_range(bits)
    codes = weight.reshape(*scale.shape, -1) / scale.float().unsqueeze(2)
    codes.round_()
    if zero_point is not None:
        codes += zero_point.float().unsqueeze(2)
    return codes.clamp_(smallest, largest).to(torch.int8).reshape(weight.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return the float32 weights [O, I] of codes [O, I]; scale and zero_point are [O, G]."""
    values = codes.reshape(*scale.shape, -1).float()
    if zero_point is not None:
        values -= zero_point.float().unsqueeze(2)
    values *= scale.float().unsqueeze(2)
    return values.reshape(codes.shape)


def dequantize_layer(layer: QuantizedLayer) -> Tensor:
    """Return the float32 weights [O, I] of a quantized layer."""
    return dequantize(layer.codes, layer.scale, layer.zero_point)


def row_units(weight: Tensor) -> Tensor:
    """Return powers of two [O, 1] near the largest |w| of each row of [O, I].

    Divided by them, which is exact, every row has a magnitude near 1: no loss overflows.
    """
    exponent = torch.frexp(weight.abs().amax(dim=1, keepdim=True)).exponent
    return torch.exp2(exponent.clamp(-120, 120).float())
