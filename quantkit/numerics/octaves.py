"""Where within an octave a scale stands, and what that means for floating-point codes.

The steps of float8_e4m3fn are relative: 8 to an octave. Twice the scale gives the same rounded
values (as long as none is clipped or subnormal), so the choice of a scale is the choice of its
position within one octave. That matters where many values have about the same magnitude, as the
channels of keys have that hardly change from token to token: a value just below a power of two is
rounded by 1/32 of itself at the most, one just above by 1/16.
"""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = 8
"""Positions within an octave that are told apart: scales of 2**(j/8) times a power of two."""

_DROPPED_BITS = 20
"""Bits of a float32's mantissa that float8_e4m3fn does not have."""


def measure_positions(values: Tensor) -> Tensor:
    """Sum up the squared rounding errors of values at every position of the scale.

    Args:
        values: float32 [B, H, T, D].

    Returns:
        float64 [8, H]: of the values of each head with scales of 2**(j/8) and eight steps to an
        octave, neither clipped nor subnormal.
    """
    errors = []
    for position in range(POSITIONS):
        factor = 2.0 ** (position / POSITIONS)
        rounded = round_significand(values / factor).mul_(factor)
        errors.append(rounded.sub_(values).square_().sum(dim=(0, 2, 3), dtype=torch.float64))
    return torch.stack(errors)


def round_significand(values: Tensor) -> Tensor:
    """Round float32 values to the four significant bits of float8_e4m3fn, ties to even.

    The result has no bounds: it is what the cast gives for values in its normal range.
    """
    bits = values.view(torch.int32)
    odd = (bits >> _DROPPED_BITS) & 1
    rounded = bits + ((1 << (_DROPPED_BITS - 1)) - 1) + odd
    return (rounded & -(1 << _DROPPED_BITS)).view(torch.float32)


def place_scale(lowest: Tensor, position: Tensor) -> Tensor:
    """Return the smallest scales from `lowest` on at a position of the octave.

    Args:
        lowest: positive, any shape.
        position: integers in [0, 8), the same shape.

    Returns:
        float64, the same shape: 2**(position/8) times a power of two, less than 2 * lowest.
    """
    offset = position.double() / POSITIONS
    return torch.exp2(torch.ceil(torch.log2(lowest.double()) - offset) + offset)
