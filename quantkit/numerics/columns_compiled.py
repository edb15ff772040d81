"""The loops of `columns` compiled by numba, an optional package.

Rows are taken side by side, one in each lane, so that the compiler turns a step for all of them
into vector instructions. A product is added without being rounded first, as torch does.

The kernels let go of Python's lock. Importing this module raises ImportError where numba is
missing.
"""

from __future__ import annotations

import numpy as np

from quantkit.numerics.fused import Floats, fused, hold_and_round
from quantkit.numerics.ggml.kernels import compiled

_LANES = 128
"""Loops over fewer are unrolled by LLVM before it looks for vectors, and then stay scalar."""

_TOGETHER = 8
"""Columns whose products are added together to those of later turns, which are loaded once for all.
LLVM unrolls a loop over so few."""

_LARGEST = np.finfo(np.float32).max


@compiled
def _load(source: Floats, first: int, lanes: Floats) -> None:
    """Load rows of the weight into lanes [B, lanes]; the last stands in for those after it."""
    last = source.shape[1] - 1
    for column in range(source.shape[0]):
        for lane in range(_LANES):
            lanes[column, lane] = source[column, min(first + lane, last)]


@compiled
def _store(lanes: Floats, first: int, stop: int, target: Floats) -> None:
    """Store lanes [B, lanes] as rows of the weight."""
    for column in range(target.shape[0]):
        for lane in range(min(_LANES, stop - first)):
            target[column, first + lane] = lanes[column, lane]


@compiled
def _add_products(factors: Floats, change: Floats, lanes: Floats, count: int) -> None:
    """Add factors[b] * change to lanes[b] for the first `count` columns b."""
    for column in range(count):
        factor, here = factors[column], lanes[column]
        for lane in range(_LANES):
            here[lane] = fused(factor, change[lane], here[lane])


@compiled
def _add_all_products(factors: Floats, changes: Floats, lanes: Floats, count: int) -> None:
    """Do that for each of `_TOGETHER` columns, from the last to the first.

    Args:
        factors: [_TOGETHER, B]; changes: [_TOGETHER, lanes].
    """
    for column in range(count):
        here = lanes[column]
        for lane in range(_LANES):
            total = here[lane]
            for other in range(_TOGETHER):
                place = _TOGETHER - 1 - other
                total = fused(factors[place, column], changes[place, lane], total)
            here[lane] = total


@compiled
def _limit(
    offsets: Floats, first: int, smallest: int, largest: int, low: Floats, high: Floats
) -> None:
    """Write the limits of codes less zero points into lanes [B, lanes]."""
    last = offsets.shape[1] - 1
    for column in range(offsets.shape[0]):
        for lane in range(_LANES):
            offset = offsets[column, min(first + lane, last)]
            low[column, lane] = np.float32(smallest) - offset
            high[column, lane] = np.float32(largest) - offset


@compiled
def round_columns(
    target: Floats,
    errors: Floats,
    block: Floats,
    lower: Floats,
    steps: Floats,
    offsets: Floats | None,
    smallest: int,
    largest: int,
    start: int,
    stop: int,
) -> None:
    """`columns.round_columns` for the rows from `start` to `stop`."""
    size = block.shape[0]
    value, step, error = (
        np.empty((size, _LANES), np.float32),
        np.empty((size, _LANES), np.float32),
        np.empty((size, _LANES), np.float32),
    )
    low, high = (
        np.full((size, _LANES), smallest, np.float32),
        np.full((size, _LANES), largest, np.float32),
    )
    for first in range(start, stop, _LANES):
        _load(target, first, value)
        _load(steps, first, step)
        _load(block, first, error)
        if offsets is not None:
            _limit(offsets, first, smallest, largest, low, high)
        for stop_column in range(size, 0, -_TOGETHER):
            begin = max(0, stop_column - _TOGETHER)
            for column in range(stop_column - 1, begin - 1, -1):
                for lane in range(_LANES):
                    code = hold_and_round(
                        value[column, lane] / step[column, lane],
                        low[column, lane],
                        high[column, lane],
                    )
                    value[column, lane] = code
                    error[column, lane] = fused(-code, step[column, lane], error[column, lane])
                near = column - begin
                _add_products(lower[column, begin:], error[column], value[begin:], near)
            if begin:
                together = slice(begin, stop_column)
                _add_all_products(lower[together], error[together], value, begin)
        _store(value, first, stop, target)
        _store(error, first, stop, errors)


@compiled
def _gain(curvature: np.float32, step: np.float32) -> np.float32:
    """Return the steps that a unit of the residual is worth; 0 for a column never active."""
    worth = np.float32(1.0) / (curvature * step) if curvature > 0 else np.float32(0.0)
    # Finite also where a step is tiny beside its row, so that nothing times it is nothing.
    worth = -_LARGEST if worth < -_LARGEST else worth
    return _LARGEST if worth > _LARGEST else worth


@compiled
def descend_columns(
    values: Floats,
    residual: Floats,
    steps: Floats,
    inner: Floats,
    offsets: Floats | None,
    smallest: int,
    largest: int,
    start: int,
    stop: int,
) -> None:
    """`columns.descend_columns` for the rows from `start` to `stop`."""
    size, groups = values.shape[0], steps.shape[0]
    value, rest, step = (
        np.empty((size, _LANES), np.float32),
        np.empty((size, _LANES), np.float32),
        np.empty((groups, _LANES), np.float32),
    )
    low, high = (
        np.full((groups, _LANES), smallest, np.float32),
        np.full((groups, _LANES), largest, np.float32),
    )
    change = np.empty(_LANES, np.float32)
    for first in range(start, stop, _LANES):
        _load(values, first, value)
        _load(residual, first, rest)
        _load(steps, first, step)
        if offsets is not None:
            _limit(offsets, first, smallest, largest, low, high)
        for column in range(size):
            group, curvature = column // (size // groups), inner[column, column]
            moved = False
            for lane in range(_LANES):
                old = value[column, lane]
                best = fused(rest[column, lane], _gain(curvature, step[group, lane]), old)
                code = hold_and_round(best, low[group, lane], high[group, lane])
                change[lane] = (old - code) * step[group, lane]
                value[column, lane] = code
                moved |= old != code
            # Most columns stay as they are, already in the first sweep after compensation.
            if moved:
                _add_products(inner[column], change, rest, size)
        _store(value, first, stop, values)
        _store(rest, first, stop, residual)
