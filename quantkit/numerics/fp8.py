"""Floating-point codes of eight bits, float8_e4m3fn: a sign, four bits of exponent, three more.

The values are +-m * 2**e with eight steps to an octave from 2**-6 to 448, and steps of 2**-9
below; there are no infinities, and what is larger than 448 would be cast to NaN, so it is clamped
first (arXiv 2209.05433). Blocks of 128 x 128 weights share a scale as in DeepSeek-V3 (arXiv
2412.19437); those at the right and lower edges may be smaller.

Shapes: O output features, I input features, P = ceil(O / 128), Q = ceil(I / 128).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.schemes import BLOCK_SIZE

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of a code."""

_EXPONENT_BITS = 0x7F800000
_SMALLEST_EXPONENT = 121 << 23
"""Bits of 2**-6: below it the steps stay as they are."""
_MANTISSA_BITS = 3 << 23
"""Taken from the bits of a power of two: divided by eight."""


def round_to_fp8(values: Tensor) -> Tensor:
    """Round float32 values, any shape, to the nearest values of a code, in place.

    Ties go to the even mantissa and what is too large becomes the largest value: what a clamped
    cast to `torch.float8_e4m3fn` and back gives, in a fraction of the time on a CPU.
    """
    step = fp8_steps(values.clamp_(-LARGEST, LARGEST))
    # Powers of two: only the rounding rounds.
    return values.div_(step).round_().mul_(step)


def fp8_steps(values: Tensor) -> Tensor:
    """Return the distance between the two codes around each of float32 values."""
    steps = values.view(torch.int32) & _EXPONENT_BITS
    return steps.clamp_(min=_SMALLEST_EXPONENT).sub_(_MANTISSA_BITS).view(torch.float32)


def gather_blocks(weight: Tensor) -> Tensor:
    """Return [P, Q, 128 * 128]: the weights of every block of [O, I] along the last axis.

    What treats groups of a row so treats blocks. Blocks that reach over an edge are filled up with
    zeros.
    """
    rows, columns = weight.shape
    filled = torch.nn.functional.pad(weight, (0, -columns % BLOCK_SIZE, 0, -rows % BLOCK_SIZE))
    blocks = filled.reshape(-(-rows // BLOCK_SIZE), BLOCK_SIZE, -1, BLOCK_SIZE)
    return blocks.transpose(1, 2).flatten(2)


def repeat_block_rows(scale: Tensor, rows: int) -> Tensor:
    """Return the scales [rows, Q] of every row for scales [P, Q] of blocks."""
    return scale.repeat_interleave(BLOCK_SIZE, dim=0)[:rows]


def multiply_blocks(values: Tensor, scale: Tensor) -> Tensor:
    """Multiply float32 values [O, I] by the scales [P, Q] of their blocks, in place."""
    spread = repeat_block_rows(scale.float(), len(values))
    for block, part in enumerate(values.split(BLOCK_SIZE, dim=1)):
        part.mul_(spread[:, block : block + 1])
    return values


def divide_blocks(values: Tensor, scale: Tensor) -> Tensor:
    """Divide float32 values [O, I] by the scales [P, Q] of their blocks, in place."""
    spread = repeat_block_rows(scale.float(), len(values))
    for block, part in enumerate(values.split(BLOCK_SIZE, dim=1)):
        part.div_(spread[:, block : block + 1])
    return values
