"""Packing of small signed integers into 32-bit words in one pass over the codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.numerics.kernels.device import kernel

_WORDS = 256


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [O, I] along I into int32 [O, ceil(I * bits / 32)]: integers alone.

    Args:
        bits: 1, 2, 4 or 8, of codes that fit into them.
    """
    rows, columns = codes.shape
    words = triton.cdiv(columns * bits, 32)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    if packed.numel():
        with torch.cuda.device_of(codes):
            _pack_words[(triton.cdiv(packed.numel(), _WORDS),)](
                codes.contiguous(),
                packed,
                columns,
                words,
                packed.numel(),
                BITS=bits,
                WORDS=_WORDS,
                enable_fp_fusion=False,
            )
    return packed


@kernel
def _pack_words(
    codes: tl.tensor,
    packed: tl.tensor,
    columns: tl.tensor,
    words: tl.tensor,
    total: tl.tensor,
    BITS: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
) -> None:
    index = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = index < total
    row, first = index // words, index % words * (32 // BITS)
    result = tl.zeros((WORDS,), dtype=tl.int32)
    for lane in range(32 // BITS):
        known = inside & (first + lane < columns)
        code = tl.load(codes + row * columns + first + lane, mask=known, other=0).to(tl.int32)
        # Shifted to be unsigned, but for what fills up the last word.
        unsigned = tl.where(known, code + (1 << (BITS - 1)), 0)
        result |= unsigned << (lane * BITS)
    tl.store(packed + index, result, mask=inside)
