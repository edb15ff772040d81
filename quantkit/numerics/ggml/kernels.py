"""The searches of `encode_k_search` compiled by numba, an optional package: the same bits, sooner.

A kernel handles some sub-blocks side by side, one in each lane, so that the compiler turns a step
for all of them into vector instructions; the sums of each keep their order. Nothing here may be
reordered, fused or done in float64: constants are float32, and numba's fast math stays off.

The kernels let go of Python's lock. Importing this module raises ImportError where numba is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

_LANES = 32
_ZERO, _ONE = np.float32(0), np.float32(1)
_ROUNDING = np.float32(12582912)
_TINY = np.float32(1e-15)

SQUARES, MAGNITUDES, SHIFTED_MAGNITUDES, GIVEN, GIVEN_BY_SIZE = range(5)
"""What an error costs: x^2, |x|, rms + |x|, what is given, or that times sqrt(energy + x^2)."""

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function on its first call, and keep the result for later processes."""
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # There is no folder to keep compiled code in.
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(_Function, compiled)


def _generate_bits(_: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


_bits = cast(Callable[[np.float32], np.int32], intrinsic(_generate_bits))
"""Return the bits of a float32 as an int32."""


@compiled
def nearest(value: np.float32, low: int, high: int) -> np.int32:
    """Round to an integer as `nearest_integers` does and hold it in a range."""
    integer = (_bits(value + _ROUNDING) & np.int32(0x7FFFFF)) - np.int32(0x400000)
    return min(max(integer, np.int32(low)), np.int32(high))


@compiled
def _load(weight: Floats, first: int, x: Floats) -> None:
    """Load sub-blocks into lanes, x [P, lanes]; the last stands in for those after it."""
    for lane in range(_LANES):
        row = min(first + lane, weight.shape[0] - 1)
        for place in range(weight.shape[1]):
            x[place, lane] = weight[row, place]


@compiled
def _store(codes: Codes, first: int, lanes: Codes) -> None:
    """Store codes of lanes, [P, lanes], as rows."""
    for lane in range(min(_LANES, codes.shape[0] - first)):
        for place in range(codes.shape[1]):
            codes[first + lane, place] = lanes[place, lane]


@compiled
def _energies(weight: Floats, super_block: int, factor: np.float32) -> Floats:
    """Return factor times the mean square of each super-block."""
    flat = weight.ravel()
    result = np.empty(flat.size // super_block, np.float32)
    for index in range(result.size):
        total = _ZERO
        for place in range(index * super_block, (index + 1) * super_block):
            total += flat[place] * flat[place]
        result[index] = factor * total / np.float32(super_block)
    return result


@compiled
def _weigh(
    mode: int, x: Floats, first: int, rows: int, cost: Floats, energy: Floats, w: Floats
) -> None:
    """Fill in what an error costs, w [P, lanes]."""
    places = x.shape[0]
    if mode == SQUARES:
        for place in range(places):
            for lane in range(_LANES):
                w[place, lane] = x[place, lane] * x[place, lane]
    elif mode in (MAGNITUDES, SHIFTED_MAGNITUDES):
        shift = np.zeros(_LANES, np.float32)
        if mode == SHIFTED_MAGNITUDES:
            for place in range(places):
                for lane in range(_LANES):
                    shift[lane] += x[place, lane] * x[place, lane]
            for lane in range(_LANES):
                shift[lane] = np.sqrt(shift[lane] / np.float32(places))
        for place in range(places):
            for lane in range(_LANES):
                w[place, lane] = shift[lane] + abs(x[place, lane])
    else:
        in_super_block = 256 // places
        for lane in range(_LANES):
            row = min(first + lane, rows - 1)
            column = row * places % cost.size
            for place in range(places):
                w[place, lane] = cost[column + place]
            if mode == GIVEN_BY_SIZE:
                size = energy[row // in_super_block]
                for place in range(places):
                    w[place, lane] *= np.sqrt(size + x[place, lane] * x[place, lane])


@compiled
def search_affine(
    weight: Floats,
    mode: int,
    cost: Floats,
    factor: np.float32,
    spans: Floats,
    top: int,
    absolute: bool,
    scale: Floats,
    minimum: Floats,
    sums: Floats,
    codes: Codes,
) -> None:
    """Do what `encode_k_search.search_affine` does, for the rows of weight [M, P].

    The last four are results: float32 [M], [M], [M], int8 [M, P]; `sums` are the summed weights.
    Where costs are given, numbers do not wrap.
    """
    rows, places = weight.shape
    energy = np.empty(0, np.float32)
    if mode == GIVEN_BY_SIZE:
        energy = _energies(weight, 256, factor)
    x, w = np.empty((places, _LANES), np.float32), np.empty((places, _LANES), np.float32)
    levels = np.empty((places, _LANES), np.float32)
    lanes = np.empty((places, _LANES), np.int8)
    lane_scale, low, sum_w = _lanes(), _lanes(), _lanes()
    for first in range(0, rows, _LANES):
        _load(weight, first, x)
        _weigh(mode, x, first, rows, cost, energy, w)
        _search_affine_lanes(
            x, w, spans, top, absolute, mode < GIVEN, lane_scale, low, sum_w, levels, lanes
        )
        for lane in range(min(_LANES, rows - first)):
            scale[first + lane] = lane_scale[lane]
            minimum[first + lane] = -low[lane]
            sums[first + lane] = sum_w[lane]
        _store(codes, first, lanes)


@compiled
def _search_affine_lanes(
    x: Floats,
    w: Floats,
    spans: Floats,
    top: int,
    absolute: bool,
    wraps: bool,
    scale: Floats,
    low: Floats,
    sum_w: Floats,
    levels: Floats,
    codes: Codes,
) -> None:
    high, sum_x, least, error, inverse = _lanes(), _lanes(), _lanes(), _lanes(), _lanes()
    trial_scale, trial_low, determinant = _lanes(), _lanes(), _lanes()
    _measure(x, w, low, high, sum_w, sum_x)
    for lane in range(_LANES):
        # Equal weights have an infinite inverse and a scale of 0, which no attempt improves.
        inverse[lane] = np.float32(top) / (high[lane] - low[lane])
        scale[lane] = _ONE / inverse[lane]
    best_inverse, best_low = inverse.copy(), low.copy()
    improved = np.zeros(_LANES, np.bool_)
    _round_affine(x, inverse, low, top, True, levels)
    _affine_error(x, w, levels, scale, low, absolute, least)
    for place in range(x.shape[0]):
        for lane in range(_LANES):
            codes[place, lane] = np.int8(levels[place, lane])
    for step in range(spans.size):
        for lane in range(_LANES):
            inverse[lane] = spans[step] / (high[lane] - low[lane])
        _round_affine(x, inverse, low, top, wraps, levels)
        _regress(x, w, levels, sum_w, sum_x, determinant, trial_scale, trial_low)
        _affine_error(x, w, levels, trial_scale, trial_low, absolute, error)
        for lane in range(_LANES):
            better = (determinant[lane] > _ZERO) & (error[lane] < least[lane])
            improved[lane] |= better
            least[lane] = error[lane] if better else least[lane]
            best_inverse[lane] = inverse[lane] if better else best_inverse[lane]
            best_low[lane] = low[lane] if better else best_low[lane]
            scale[lane] = trial_scale[lane] if better else scale[lane]
            low[lane] = trial_low[lane] if better else low[lane]
    _round_affine(x, best_inverse, best_low, top, wraps, levels)
    for place in range(x.shape[0]):
        for lane in range(_LANES):
            if improved[lane]:
                codes[place, lane] = np.int8(levels[place, lane])


@compiled
def _lanes() -> Floats:
    return np.empty(_LANES, np.float32)


@compiled
def _measure(x: Floats, w: Floats, low: Floats, high: Floats, sum_w: Floats, sum_x: Floats) -> None:
    """Find the range of blocks, its lower end at most 0, and the sums that are the same always."""
    for lane in range(_LANES):
        low[lane] = high[lane] = x[0, lane]
        # From -0, so that a sum of -0 stays one: it can become the sign of a minimum.
        sum_w[lane], sum_x[lane] = _ZERO, -_ZERO
    for place in range(x.shape[0]):
        for lane in range(_LANES):
            value = x[place, lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]
            sum_w[lane] += w[place, lane]
            sum_x[lane] += w[place, lane] * value
    for lane in range(_LANES):
        low[lane] = _ZERO if low[lane] > _ZERO else low[lane]


@compiled
def _round_affine(
    x: Floats, inverse: Floats, low: Floats, top: int, wraps: bool, levels: Floats
) -> None:
    full = np.float32(top)
    for place in range(x.shape[0]):
        for lane in range(_LANES):
            value = inverse[lane] * (x[place, lane] - low[lane])
            held = value if value > _ZERO else _ZERO
            held = held if held < full else full
            levels[place, lane] = np.float32(nearest(value if wraps else held, 0, top))


@compiled
def _regress(
    x: Floats,
    w: Floats,
    levels: Floats,
    sum_w: Floats,
    sum_x: Floats,
    determinant: Floats,
    scale: Floats,
    low: Floats,
) -> None:
    """Find the scale and lower end that fit best, or the scale alone where that is positive."""
    sum_l, sum_l2, sum_xl = _lanes(), _lanes(), _lanes()
    for lane in range(_LANES):
        sum_l[lane] = sum_l2[lane] = sum_xl[lane] = _ZERO
    for place in range(x.shape[0]):
        for lane in range(_LANES):
            weighted = w[place, lane] * levels[place, lane]
            sum_l[lane] += weighted
            sum_l2[lane] += weighted * levels[place, lane]
            sum_xl[lane] += weighted * x[place, lane]
    for lane in range(_LANES):
        determinant[lane] = sum_w[lane] * sum_l2[lane] - sum_l[lane] * sum_l[lane]
        slope = sum_w[lane] * sum_xl[lane] - sum_x[lane] * sum_l[lane]
        level = sum_l2[lane] * sum_x[lane] - sum_l[lane] * sum_xl[lane]
        level = level / determinant[lane]
        alone = sum_xl[lane] / sum_l2[lane]
        scale[lane] = alone if level > _ZERO else slope / determinant[lane]
        low[lane] = _ZERO if level > _ZERO else level


@compiled
def _affine_error(
    x: Floats, w: Floats, levels: Floats, scale: Floats, low: Floats, absolute: bool, error: Floats
) -> None:
    for lane in range(_LANES):
        error[lane] = _ZERO
    for place in range(x.shape[0]):
        for lane in range(_LANES):
            off = scale[lane] * levels[place, lane] + low[lane] - x[place, lane]
            cost = abs(off) if absolute else off * off
            error[lane] += w[place, lane] * cost


@compiled
def search_symmetric(
    weight: Floats,
    mode: int,
    cost: Floats,
    factor: np.float32,
    spans: Floats,
    top: int,
    scale: Floats,
    sums: Floats,
    codes: Codes,
) -> None:
    """Do what `encode_k_search.search_symmetric` does, for the rows of weight [M, P].

    The last three are results: float32 [M], [M], int8 [M, P]; `sums` are the summed weights. The
    first of the spans is `top`, which is tried first.
    """
    rows, places = weight.shape
    energy = np.empty(0, np.float32)
    if mode == GIVEN_BY_SIZE:
        energy = _energies(weight, 256, factor)
    x, w = np.empty((places, _LANES), np.float32), np.empty((places, _LANES), np.float32)
    lanes = np.empty((places, _LANES), np.int8)
    lane_scale, sum_w = _lanes(), _lanes()
    for first in range(0, rows, _LANES):
        _load(weight, first, x)
        _weigh(mode, x, first, rows, cost, energy, w)
        _search_symmetric_lanes(x, w, spans, top, lane_scale, sum_w, lanes)
        for lane in range(min(_LANES, rows - first)):
            scale[first + lane] = lane_scale[lane]
            sums[first + lane] = sum_w[lane]
        _store(codes, first, lanes)


@compiled
def _search_symmetric_lanes(
    x: Floats, w: Floats, spans: Floats, top: int, scale: Floats, sum_w: Floats, codes: Codes
) -> None:
    places = x.shape[0]
    extreme, size, best = _lanes(), _lanes(), _lanes()
    inverse, best_inverse, sum_lx, sum_l2 = _lanes(), _lanes(), _lanes(), _lanes()
    for lane in range(_LANES):
        extreme[lane] = size[lane] = sum_w[lane] = _ZERO
    for place in range(places):
        for lane in range(_LANES):
            value = x[place, lane]
            larger = abs(value) > size[lane]
            extreme[lane] = value if larger else extreme[lane]
            size[lane] = abs(value) if larger else size[lane]
            sum_w[lane] += w[place, lane]
    for step in range(spans.size):
        for lane in range(_LANES):
            inverse[lane] = -spans[step] / extreme[lane]
        _fit_symmetric(x, w, inverse, top, sum_lx, sum_l2)
        for lane in range(_LANES):
            fitted = sum_lx[lane] / sum_l2[lane]
            if step == 0:
                scale[lane] = fitted if sum_l2[lane] != _ZERO else _ZERO
                best[lane] = scale[lane] * sum_lx[lane]
                best_inverse[lane] = inverse[lane]
            else:
                gains = sum_lx[lane] * sum_lx[lane] > best[lane] * sum_l2[lane]
                better = (sum_l2[lane] > _ZERO) & gains
                scale[lane] = fitted if better else scale[lane]
                best[lane] = fitted * sum_lx[lane] if better else best[lane]
                best_inverse[lane] = inverse[lane] if better else best_inverse[lane]
    for place in range(places):
        for lane in range(_LANES):
            code = nearest(best_inverse[lane] * x[place, lane], -top, top - 1)
            codes[place, lane] = np.int8(-top if size[lane] < _TINY else code)
    for lane in range(_LANES):
        scale[lane] = _ZERO if size[lane] < _TINY else scale[lane]


@compiled
def _fit_symmetric(
    x: Floats, w: Floats, inverse: Floats, top: int, sum_lx: Floats, sum_l2: Floats
) -> None:
    for lane in range(_LANES):
        sum_lx[lane] = sum_l2[lane] = _ZERO
    for place in range(x.shape[0]):
        for lane in range(_LANES):
            value = inverse[lane] * x[place, lane]
            level = np.float32(nearest(value, -top, top - 1))
            sum_lx[lane] += w[place, lane] * x[place, lane] * level
            sum_l2[lane] += w[place, lane] * level * level


@compiled
def round_codes(
    weight: Floats, scale: Floats, minimum: Floats, low: int, high: int, codes: Codes
) -> None:
    """Round the rows of weight [M, P] under scales that are stored, where they are not zero."""
    for row in range(weight.shape[0]):
        if scale[row] != _ZERO:
            for place in range(weight.shape[1]):
                value = (weight[row, place] - minimum[row]) / scale[row]
                codes[row, place] = np.int8(nearest(value, low, high))
