"""llama.cpp's encoder of IQ4_NL and IQ4_XS, whose codes stand for 16 uneven values.

The scale of 32 weights is the best of 16, each refitted to the values that it chooses
(`quantize_row_iq4_nl_impl` of ggml-quants.c of llama.cpp). The same bytes ask for the same float32
operations in the same order; encode_k_search.py says more.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.encode_k_search import (
    TINY,
    divide_by_number,
    divide_number,
    largest_magnitude,
    nearest_integers,
    sum_in_order,
)
from quantkit.numerics.ggml.simple import weigh

NONLINEAR_KINDS = frozenset(("IQ4_NL", "IQ4_XS"))
"""Names of the types that this module encodes."""

_VALUES = GGML_TYPES["IQ4_NL"].values
_TRIES = 7
"""Steps of one value to either side of the lowest, at which the largest weight is tried."""

# Borders between values lie on half integers, so that all levels of a half step have one code.
_BORDERS = tuple(low + high for low, high in pairwise(_VALUES))
_FIRST_STEP, _LAST_STEP = _BORDERS[0] - 1, _BORDERS[-1]
_CODES = torch.tensor(
    [sum(border <= step for border in _BORDERS) for step in range(_FIRST_STEP, _LAST_STEP + 1)]
)
_CODES_OF_STEPS = _CODES.to(torch.int8)
_VALUES_OF_STEPS = torch.tensor(_VALUES, dtype=torch.float32)[_CODES]


def encode_nonlinear(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> GgmlBlocks:
    """Choose codes and scales of finite float32 [R, I]; importance: float32 [I] or None.

    Raises:
        ValueError: the type is not of this module.
    """
    if kind.name not in NONLINEAR_KINDS:
        raise ValueError(f"{kind.name} is none of {', '.join(sorted(NONLINEAR_KINDS))}")
    costs = weight * weight
    if importance is not None:
        costs = weigh(weight, importance, _mean_squares(kind, costs))
    x = _as_places(weight, kind.sub_block)
    found = _search_scales(x, _as_places(costs, kind.sub_block))
    rows = len(weight)
    if kind.sub_scales is None:
        codes = nearest_codes(x * _inverse_or_zero(found))
        return GgmlBlocks(kind, _as_rows(codes, rows), found.half().reshape(rows, -1))
    d, sub_scales = _round_scales(found.reshape(-1, kind.block // kind.sub_block), kind.sub_scales)
    # The codes are those for the scale before d is rounded to float16, as in ggml.
    scales = (d.unsqueeze(1) * sub_scales).flatten()
    return GgmlBlocks(
        kind,
        _as_rows(nearest_codes(x * _inverse_or_zero(scales)), rows),
        d.half().reshape(rows, -1),
        sub_scales=sub_scales.to(torch.int8).reshape(rows, -1),
    )


def _as_places(weight: Tensor, size: int) -> Tensor:
    """Return [R, I] as [size, N]: the first weights of all N blocks, then the second ones."""
    return weight.reshape(-1, size).T.contiguous()


def _as_rows(places: Tensor, rows: int) -> Tensor:
    return places.T.reshape(rows, -1)


def nearest_codes(levels: Tensor) -> Tensor:
    """Return the codes int8 of the values nearest to float32; the larger value of two as near."""
    # The search in C ends at the last value if no comparison is true.
    return _look_up(levels.nan_to_num(nan=_VALUES[-1]), _CODES_OF_STEPS)


def _mean_squares(kind: GgmlType, squares: Tensor) -> Tensor:
    """Return twice the mean square of a weight's block, [R, I]."""
    sums = sum_in_order(_as_places(squares, kind.block)) * (2 / kind.block)
    return sums.repeat_interleave(kind.block).reshape(squares.shape)


def _search_scales(x: Tensor, costs: Tensor) -> Tensor:
    """Return the scale of the least cost for each sub-block; x and costs: [sub_block, N]."""
    extreme = largest_magnitude(x)
    lowest = _VALUES[0]
    first = divide_number(1.0, divide_by_number(-extreme, lowest))
    value_sum, square_sum = _fit(x, costs, first)
    scale = torch.where(square_sum > 0, value_sum / square_sum, 0.0)
    best = scale * value_sum
    for offset in range(-_TRIES, _TRIES + 1):
        value_sum, square_sum = _fit(x, costs, divide_number(lowest + offset, extreme))
        better = (square_sum > 0) & (value_sum * value_sum > best * square_sum)
        scale = torch.where(better, value_sum / square_sum, scale)
        best = torch.where(better, scale * value_sum, best)
    return scale.masked_fill_(extreme.abs() < TINY, 0)


def _fit(x: Tensor, costs: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums [N] of the regression of the weights on the values that a scale chooses."""
    # Blocks of zeros, whose inverse is infinite, get a scale of 0 in the end.
    levels = (x * inverse).nan_to_num_(nan=0.0)
    weighted = _look_up(levels, _VALUES_OF_STEPS)
    values = weighted.clone()
    weighted *= costs
    return sum_in_order(weighted * x), sum_in_order(weighted.mul_(values))


def _round_scales(scales: Tensor, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Round scales [B, n] of sub-blocks to integers: d [B], not yet float16, and the integers."""
    d = divide_by_number(-largest_magnitude(scales.T), -limits[0])
    integers = nearest_integers(scales * _inverse_or_zero(d).unsqueeze(1))
    return d, integers.clamp_(*limits)


def _inverse_or_zero(values: Tensor) -> Tensor:
    return torch.where(values != 0, divide_number(1.0, values), 0.0)


def _look_up(levels: Tensor, table: Tensor) -> Tensor:
    """Return the entry of each level's half step; far quicker than a search for its interval."""
    steps = (levels * 2).floor_().clamp_(_FIRST_STEP, _LAST_STEP).sub_(_FIRST_STEP)
    entries = table.to(levels.device).index_select(0, steps.to(torch.int32).flatten())
    return entries.view_as(levels)
