"""The searches of ggml's K-quants for scales, minimums and codes (ggml-quants.c of llama.cpp).

Blocks lie along the last dimensions of tensors whose first is the place within the block, so that
a step of the search is one operation for all of them. Bytes equal to llama.cpp's ask for its
operations in float32, in its order: sums run from the first place to the last, divisions are
divisions (torch turns one by or of a Python number into a product in places), nothing is fused.
Where a block leaves a loop early it is carried along, and what is found for it is put aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType

TINY = float(np.float32(1e-15))
"""Blocks whose largest magnitude is below this are zeros."""

_ROUNDING = 12582912.0
"""1.5 * 2^23: the sum of it and a smaller number is rounded to an integer in its low bits."""


@dataclass(frozen=True)
class AffineGrid:
    """Which scales `search_affine` tries."""

    top: int
    """The largest code."""
    start: float
    step: float
    steps: int
    """Steps, each an attempt at (start + step * i + top) / range codes for a unit."""
    absolute: bool = False
    """Whether the error is the sum of magnitudes, not of squares."""
    wraps: bool = False
    """Whether numbers are rounded first and held in range then, so that huge ones wrap."""

    def spans(self) -> list[float]:
        """Return how many codes the range of a block is given at each attempt, in float32."""
        start, step, top = np.float32(self.start), np.float32(self.step), np.float32(self.top)
        return [float(start + step * np.float32(index) + top) for index in range(self.steps + 1)]


_PLAIN_GRIDS: Mapping[str, AffineGrid] = {
    "Q2_K": AffineGrid(3, -0.5, 0.1, 15, absolute=True, wraps=True),
    "Q4_K": AffineGrid(15, -1.0, 0.1, 20, wraps=True),
    "Q5_K": AffineGrid(31, -0.5, 0.1, 15, wraps=True),
}
"""Without an importance matrix."""


def affine_grid(kind: GgmlType, plain: bool) -> AffineGrid:
    """Return the scales that llama.cpp tries, `plain` being without an importance matrix."""
    return _PLAIN_GRIDS[kind.name] if plain else AffineGrid(kind.codes[1], -0.9, 0.05, 36)


@dataclass(frozen=True)
class Search:
    """What a search finds for all sub-blocks of some rows.

    Shapes: S sub-blocks of a super-block, N super-blocks of all rows.
    """

    scale: Tensor
    """Float32 [S, N]."""
    codes: Tensor
    """Int8 [R, I]."""
    minimum: Tensor | None = None
    """Float32 [S, N], to be subtracted."""
    weights: Tensor | None = None
    """Float32 [S, N], what an error of a scale costs; None without an importance matrix."""


def symmetric_spans(top: int) -> list[float]:
    """Return how many codes `search_symmetric` gives to the largest magnitude, in float32."""
    return _spans_around(top, 9)


def _spans_around(top: int, width: int) -> list[float]:
    tenth = np.float32(0.1)
    offsets = [index for index in range(-width, width + 1) if index]
    return [float(tenth * np.float32(index) + np.float32(top)) for index in offsets]


def nearest_integers(values: Tensor) -> Tensor:
    """Round float32 to int32, ties to even, the way ggml's `nearest_int` does.

    That reads the low bits of a sum: what is not below 2^22 comes out as some number that is, and
    what is not a number as 0.
    """
    shifted = values + _ROUNDING
    integers = (shifted.view(torch.int32) & 0x7FFFFF) - 0x400000
    return integers.masked_fill_(shifted.isnan(), 0)


def divide_number(number: float, divisor: Tensor) -> Tensor:
    """Return number / divisor, rounded once."""
    return torch.full_like(divisor, number) / divisor


def divide_by_number(dividend: Tensor, number: float) -> Tensor:
    """Return dividend / number, rounded once."""
    return dividend / torch.full_like(dividend, number)


def square_root(values: Tensor) -> Tensor:
    """Return the square roots of float32, rounded correctly, as torch's own are not on all CPUs."""
    return values.double().sqrt().float()


def sum_in_order(terms: Tensor, first: Tensor | None = None) -> Tensor:
    """Return the sum of [P, ...] over P, one term after the other.

    Args:
        first: what to begin with: 0 if it is None, which turns a sum of -0 into 0.
    """
    total = torch.zeros_like(terms[0]) if first is None else first.clone()
    for term in terms:
        total += term
    return total


def largest(values: Tensor) -> Tensor:
    """Return the largest of [P, ...] over P; 0 where none is positive."""
    result = torch.zeros_like(values[0])
    for value in values:
        result = torch.where(value > result, value, result)
    return result


def largest_magnitude(values: Tensor) -> Tensor:
    """Return the value of largest magnitude of [P, ...] over P, the first where several are."""
    result, size = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for value in values:
        larger = value.abs() > size
        result = torch.where(larger, value, result)
        size = torch.where(larger, value.abs(), size)
    return result


def search_affine(x: Tensor, weights: Tensor, grid: AffineGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Search scale and minimum of blocks by regression on the codes of a few scales.

    The weights of the block are near scale * code - minimum: ggml's `make_qkx2_quants` and
    `make_qkx3_quants`, which differ in the grid alone.

    Args:
        x, weights: [P, ...], blocks and what an error costs.

    Returns:
        Scale and minimum [...], and codes int32 [P, ...].
    """
    low, high = _extent(x)
    sum_w, sum_x = sum_in_order(weights), sum_in_order(weights[1:] * x[1:], weights[0] * x[0])
    flat = high == low
    scale = divide_number(1.0, divide_number(grid.top, high - low))
    minimum = low
    codes = _affine_codes(x, low, divide_number(grid.top, high - low), grid.top, wraps=True)
    least = _affine_error(x, weights, codes.float(), scale, low, grid.absolute)
    for span in grid.spans():
        inverse = divide_number(span, high - minimum)
        trial = _affine_codes(x, minimum, inverse, grid.top, grid.wraps)
        levels = trial.float()
        weighted = weights * levels
        sum_l, sum_l2 = sum_in_order(weighted), sum_in_order(weighted * levels)
        sum_xl = sum_in_order(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = new_minimum > 0
        new_scale = torch.where(positive, sum_xl / sum_l2, new_scale)
        new_minimum = new_minimum.masked_fill(positive, 0)
        error = _affine_error(x, weights, levels, new_scale, new_minimum, grid.absolute)
        better = (determinant > 0) & (error < least)
        codes = torch.where(better, trial, codes)
        least = torch.where(better, error, least)
        scale = torch.where(better, new_scale, scale)
        minimum = torch.where(better, new_minimum, minimum)
    minimum = torch.where(flat, low, minimum)
    return scale.masked_fill_(flat, 0), -minimum, codes.masked_fill_(flat, 0)


def _extent(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest value, at most 0, and the largest value of blocks."""
    low = high = x[0]
    for value in x[1:]:
        low = torch.where(value < low, value, low)
        high = torch.where(value > high, value, high)
    return torch.where(low > 0, torch.zeros_like(low), low), high


def _affine_codes(x: Tensor, low: Tensor, inverse: Tensor, top: int, wraps: bool) -> Tensor:
    values = inverse * (x - low)
    if not wraps:
        values = torch.where(values > 0, values, torch.zeros_like(values)).clamp_(max=top)
    return nearest_integers(values).clamp_(0, top)


def _affine_error(
    x: Tensor, weights: Tensor, levels: Tensor, scale: Tensor, low: Tensor, absolute: bool
) -> Tensor:
    error = scale * levels + low - x
    return sum_in_order(weights * (error.abs_() if absolute else error.square_()))


def search_symmetric(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Search the scale of blocks whose codes are -top to top - 1: ggml's `make_qx_quants`.

    Args:
        x, weights: [P, ...], blocks and what a squared error costs.

    Returns:
        Scale [...], and codes int32 [P, ...].
    """
    extreme = largest_magnitude(x)
    codes, sum_lx, sum_l2 = _fit_symmetric(x, weights, divide_number(-top, extreme), top)
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, torch.zeros_like(sum_l2))
    best = scale * sum_lx
    for span in symmetric_spans(top):
        trial, sum_lx, sum_l2 = _fit_symmetric(x, weights, divide_number(-span, extreme), top)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        codes = torch.where(better, trial, codes)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
    zero = extreme.abs() < TINY
    return scale.masked_fill_(zero, 0), codes.masked_fill_(zero, -top)


def _fit_symmetric(
    x: Tensor, weights: Tensor, inverse: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of an inverse scale, and the sums that regress the blocks on them."""
    codes = nearest_integers(inverse * x).clamp_(-top, top - 1)
    levels = codes.float()
    sum_lx = sum_in_order(weights * x * levels)
    return codes, sum_lx, sum_in_order(weights * levels * levels)


def descend_symmetric(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Round blocks, then change one code after the other while the fit of the scale gains.

    It is ggml's `make_q3_quants`, in which an error costs the square of the weight.

    Returns:
        Scale [...], and codes int32 [P, ...] from -top to top - 1.
    """
    extreme = largest_magnitude(x)
    weights = x * x
    codes, sum_lx, sum_l2 = _fit_symmetric(x, weights, divide_number(-top, extreme), top)
    for _ in range(5):
        before = codes.clone()
        for place, (value, weight) in enumerate(zip(x, weights, strict=True)):
            level = codes[place].float()
            rest_lx = sum_lx - weight * value * level
            rest_l2 = sum_l2 - weight * level * level
            trial = nearest_integers(value * rest_l2 / rest_lx).clamp_(-top, top - 1)
            new = trial.float()
            new_lx, new_l2 = rest_lx + weight * value * new, rest_l2 + weight * new * new
            gains = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            better = (rest_lx > 0) & (trial != codes[place]) & (new_l2 > 0) & gains
            codes[place] = torch.where(better, trial, codes[place])
            sum_lx = torch.where(better, new_lx, sum_lx)
            sum_l2 = torch.where(better, new_l2, sum_l2)
        if torch.equal(before, codes):
            break
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, torch.zeros_like(sum_l2))
    zero = extreme.abs() < TINY
    return scale.masked_fill_(zero, 0), codes.masked_fill_(zero, -top)


def search_positive(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Search the scale of scales: blocks of numbers that are not negative, codes 0 to top.

    It is ggml's `make_qp_quants`: a few scales, then a descent over codes. Codes are bytes there,
    and negative ones, should they come up, wrap.

    Returns:
        Scale [...], and codes int32 [P, ...].
    """
    peak = torch.zeros_like(x[0])
    for value in x:
        peak = torch.where(peak > value, peak, value)
    inverse = divide_number(top, peak)
    levels = (nearest_integers(inverse * x) & 0xFF).float()
    least = _squared_error(x, weights, levels, divide_number(1.0, inverse))
    for span in _spans_around(top, 4):
        trial = divide_number(span, peak)
        levels = nearest_integers(trial * x).clamp_(max=top).float()
        error = _squared_error(x, weights, levels, divide_number(1.0, trial))
        better = error < least
        least = torch.where(better, error, least)
        inverse = torch.where(better, trial, inverse)
    codes = nearest_integers(inverse * x).clamp_(max=top)
    levels = codes.float()
    sum_lx, sum_l2 = sum_in_order(weights * x * levels), sum_in_order(weights * levels * levels)
    codes &= 0xFF
    sum_lx, sum_l2 = _descend_positive(x, weights, codes, sum_lx, sum_l2, top)
    zero = peak < TINY
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, torch.zeros_like(sum_l2))
    return scale.masked_fill_(zero, 0), codes.masked_fill_(zero, 0)


def _squared_error(x: Tensor, weights: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    error = x - scale * levels
    return sum_in_order(weights * error * error)


def _descend_positive(
    x: Tensor, weights: Tensor, codes: Tensor, sum_lx: Tensor, sum_l2: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Change codes, in place, while the fit gains; return the sums that belong to them."""
    for _ in range(5):
        before = codes.clone()
        for place, (value, weight) in enumerate(zip(x, weights, strict=True)):
            level = codes[place].float()
            rest_lx = sum_lx - weight * value * level
            rest_l2 = sum_l2 - weight * level * level
            trial = nearest_integers(value * rest_l2 / rest_lx).clamp_(max=top)
            new = trial.float()
            new_lx, new_l2 = rest_lx + weight * value * new, rest_l2 + weight * new * new
            gains = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            better = (rest_lx > 0) & (rest_l2 > 0) & (trial != codes[place]) & gains
            codes[place] = torch.where(better, trial & 0xFF, codes[place])
            sum_lx = torch.where(better, new_lx, sum_lx)
            sum_l2 = torch.where(better, new_l2, sum_l2)
        if torch.equal(before, codes):
            break
    return sum_lx, sum_l2
