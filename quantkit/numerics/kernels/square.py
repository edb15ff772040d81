"""The second moment of a batch in 16-bit floating point, added to a float32 sum.

Only tiles that reach the upper triangle are computed, in one launch, and the products go straight
into the sum: torch needs a launch and a float32 matrix of the size of the panel for each panel.

Products of 16-bit factors are exact in float32 and summed in float32 on the tensor cores; the sum
over the tokens of a batch is in registers, and is added to the total once. Against float64 the
error is that of a float32 sum, relative 1e-6 or so of sum |x_i x_j|; the order of the sum is that
of the tiles, the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.numerics.kernels.device import interpreted, kernel

_TILE = 128
_TOKENS = 64


def add_square(total: Tensor, rows: Tensor, panel: int) -> None:
    """Add rows^T rows to the upper triangle of `total`.

    Args:
        total: float32 [I, I], contiguous. rows: bfloat16 or float16 [T, I], any strides.
        panel: columns of the squares along the diagonal within which the sum is needed in full.

    Raises:
        ValueError: another dtype of the rows.
    """
    if rows.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"rows are {rows.dtype}, not bfloat16 or float16")
    tokens, size = rows.shape
    tiles = triton.cdiv(size, _TILE)
    with torch.cuda.device_of(total):
        _add_tile[(tiles, tiles)](
            total,
            rows,
            tokens,
            size,
            *rows.stride(),
            PANEL=panel,
            TILE=_TILE,
            TOKENS=_TOKENS,
            WIDEN=interpreted(),
            num_warps=8,
            num_stages=3,
            enable_fp_fusion=False,
        )


@kernel
def _add_tile(
    total: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    token_stride: tl.tensor,
    column_stride: tl.tensor,
    PANEL: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    WIDEN: tl.constexpr,  # noqa: N803
) -> None:
    first, second = tl.program_id(0) * TILE, tl.program_id(1) * TILE
    if second + TILE > first // PANEL * PANEL:
        left, right = first + tl.arange(0, TILE), second + tl.arange(0, TILE)
        within = tl.arange(0, TOKENS)
        left_place = within[:, None] * token_stride + left[None, :] * column_stride
        right_place = within[:, None] * token_stride + right[None, :] * column_stride
        found = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, tokens, TOKENS):
            known = (within < tokens - start)[:, None]
            a = tl.load(rows + left_place, mask=known & (left < size)[None, :], other=0.0)
            b = tl.load(rows + right_place, mask=known & (right < size)[None, :], other=0.0)
            if WIDEN:
                # Triton's interpreter would multiply the bits of bfloat16 as integers.
                a, b = a.to(tl.float32), b.to(tl.float32)
            found = tl.dot(tl.trans(a), b, found, input_precision="ieee")
            # The pointer itself moves on: a batch may have more than 2^31 elements.
            rows += TOKENS * token_stride
        here = (left < size)[:, None] & (right < size)[None, :]
        target = total + left.to(tl.int64)[:, None] * size + right[None, :]
        tl.store(target, tl.load(target, mask=here, other=0.0) + found, mask=here)
