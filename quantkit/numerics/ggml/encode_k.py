"""Codes and scales of the K-quants as llama.cpp chooses them, to the bit.

The algorithms are those of quantize_row_q*_K_ref and quantize_row_q*_K_impl in ggml-quants.c,
after which `ggml_quantize_chunk` goes without and with an importance matrix. For each sub-block
a search finds a scale (and a minimum); these are rounded to small integers of the super-block; then
all codes are rounded again, under the scales as they are stored.

Shapes: P places of a sub-block, S sub-blocks of a super-block, N super-blocks of all rows.
Memory: a dozen times the weight where torch searches, so callers split the rows of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.ggml import encode_k_torch
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.encode_k_search import (
    TINY,
    Search,
    divide_by_number,
    divide_number,
    largest,
    largest_magnitude,
    nearest_integers,
    search_positive,
    search_symmetric,
)
from quantkit.numerics.ggml.packing_k import SUPER_BLOCK, pack_six_bits, unpack_six_bits


@dataclass(frozen=True)
class _Way:
    """What searches and rounds: the functions of one of two modules."""

    search: Callable[[GgmlType, Tensor, Tensor | None], Search]
    round_codes: Callable[[GgmlBlocks, Tensor], Tensor]


@dataclass(frozen=True)
class _Scales:
    """What is stored of it: float16 [N] and int8 [S, N]."""

    d: Tensor
    sub_scales: Tensor
    m: Tensor | None = None
    sub_minimums: Tensor | None = None
    empty: Tensor | None = None
    """Bool [N], super-blocks to be zeroed, codes and all."""


def encode_k(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> GgmlBlocks:
    """Return float32 [R, I] in a K-quant, equal to llama.cpp's to the byte.

    Args:
        importance: float32 [I], the importance matrix: what errors in each column cost.

    Raises:
        ValueError: I is not whole super-blocks.
    """
    kind.row_bytes(weight.shape[1])
    way = _way(weight.device)
    found = way.search(kind, weight.contiguous(), importance)
    if kind.has_minimum:
        scales = _round_scales_and_minimums(kind, found)
    elif kind.name == "Q6_K":
        scales = _round_scales_of_q6(found)
    else:
        scales = _round_scales_of_q3(found)
    rows = len(weight)
    blocks = GgmlBlocks(
        type=kind,
        codes=found.codes,
        d=scales.d.reshape(rows, -1),
        m=None if scales.m is None else scales.m.reshape(rows, -1),
        sub_scales=_in_rows(scales.sub_scales, rows),
        sub_minimums=None if scales.sub_minimums is None else _in_rows(scales.sub_minimums, rows),
    )
    codes = way.round_codes(blocks, weight.contiguous())
    if scales.empty is not None:
        lowest = scales.empty.view(rows, -1).repeat_interleave(SUPER_BLOCK, dim=1)
        codes.masked_fill_(lowest, kind.codes[0])
    return replace(blocks, codes=codes)


def _way(device: torch.device) -> _Way:
    """Return the compiled searches on a processor, where numba is installed; else torch's."""
    if device.type == "cpu":
        try:
            from quantkit.numerics.ggml.encode_k_compiled import round_codes, search
        except ImportError:
            pass
        else:
            return _Way(search, round_codes)
    return _Way(encode_k_torch.search, encode_k_torch.round_codes)


def _in_rows(integers: Tensor, rows: int) -> Tensor:
    """Bring [S, N] into the rows of the tensor, [R, S of the row]."""
    return integers.t().reshape(rows, -1)


def _round_scales_and_minimums(kind: GgmlType, found: Search) -> _Scales:
    """Round scales and minimums to the integers of the type, each in a float16 of its own."""
    assert kind.sub_scales is not None
    assert found.minimum is not None
    top = kind.sub_scales[1]
    d, sub_scales = _round_to_largest(found.scale, found.weights, top)
    m, sub_minimums = _round_to_largest(found.minimum, found.weights, top)
    if kind.name == "Q2_K":
        packed = sub_scales | sub_minimums << 4
        sub_scales, sub_minimums = packed & 15, packed >> 4
    else:
        if found.weights is None or kind.name == "Q5_K":
            sub_scales, sub_minimums = sub_scales.clamp(max=top), sub_minimums.clamp(max=top)
        # Negative scales, which come of sums that lose all their digits, spoil each other here.
        packed = pack_six_bits(sub_scales.t(), sub_minimums.t())
        sub_scales, sub_minimums = (part.t() for part in unpack_six_bits(packed))
    return _Scales(d.half(), sub_scales.to(torch.int8), m.half(), sub_minimums.to(torch.int8))


def _round_to_largest(values: Tensor, weights: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """Return the scale [N] of numbers [S, N] that are not negative, and their codes, uint8."""
    if weights is not None:
        scale, codes = search_positive(values, weights, top)
        return scale, codes.to(torch.uint8)
    peak = largest(values)
    inverse = torch.where(peak > 0, divide_number(top, peak), torch.zeros_like(peak))
    return divide_by_number(peak, top), nearest_integers(inverse * values).to(torch.uint8)


def _round_scales_of_q3(found: Search) -> _Scales:
    if found.weights is not None:
        d, codes = search_symmetric(found.scale, found.weights, 32)
        return _Scales(d.half(), codes.to(torch.int8))
    extreme = largest_magnitude(found.scale)
    inverse = divide_number(-32, extreme)
    codes = nearest_integers(inverse * found.scale).to(torch.int8).clamp(-32, 31)
    none = extreme == 0
    d = divide_number(1, inverse).masked_fill(none, 0)
    return _Scales(d.half(), codes.masked_fill(none, -32))


def _round_scales_of_q6(found: Search) -> _Scales:
    extreme = largest_magnitude(found.scale)
    zero = extreme.abs() < TINY
    inverse = divide_number(-128, extreme)
    codes = nearest_integers(inverse * found.scale).clamp(max=127).to(torch.int8)
    d = divide_number(1, inverse).masked_fill(zero, 0)
    return _Scales(d.half(), codes.masked_fill(zero, 0), empty=zero)
