"""The loops of `joint_cheapest` compiled by numba, an optional package.

Rows of the weight lie side by side in the lanes of vector registers. For e H e^T a tile of sums,
some columns of H by all lanes, stays in registers while the rows of H pass by.

The kernel lets go of Python's lock. Importing this module raises ImportError where numba is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from quantkit.numerics.fused import Floats, hold_and_round
from quantkit.numerics.ggml.kernels import compiled
from quantkit.numerics.vectors import INDEX, add_product, at, find_arrays, index, spread

_WIDTH, ROWS = (16, 8) if get_host_cpu_features().get("avx512f", False) else (8, 4)
"""Numbers of a vector, and columns of H that are multiplied at a time: with three vectors of lanes
their sums take 24 of 32 registers, or 12 of 16."""

_VECTORS = 3
LANES = _WIDTH * _VECTORS
"""Rows of the weight that are looked at together."""

_BYTES = 4
_FLOATS = ir.VectorType(ir.FloatType(), _WIDTH)


def _generate_cost(_: Any, factors: Any, linear: Any, error: Any, cost: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = list(find_arrays(context, builder, signature, arguments))
        size = cgutils.unpack_tuple(builder, arrays[1].shape)[0]
        rows, given, errors, result = (builder.ptrtoint(array.data, INDEX) for array in arrays)

        def load(start: Any, row: Any, vector: int) -> Any:
            offset = builder.mul(row, index(LANES * _BYTES))
            place = builder.add(offset, index(vector * _WIDTH * _BYTES))
            return builder.load(at(builder, start, place, _FLOATS), align=_BYTES)

        def add(place: Any, left: Any, right: Any) -> None:
            builder.store(add_product(builder, left, right, builder.load(place)), place)

        zero = ir.Constant(_FLOATS, None)
        # LLVM keeps what has a place on the stack, and no address anywhere else, in registers.
        costs = [cgutils.alloca_once_value(builder, zero) for _ in range(_VECTORS)]
        tile = {
            (row, vector): cgutils.alloca_once_value(builder, zero)
            for row in range(ROWS)
            for vector in range(_VECTORS)
        }
        with cgutils.for_range(builder, builder.udiv(size, index(ROWS))) as block:
            first = builder.mul(block.index, index(ROWS))
            for (row, vector), place in tile.items():
                builder.store(load(given, builder.add(first, index(row)), vector), place)
            start = builder.add(rows, builder.mul(builder.mul(first, size), index(_BYTES)))
            with cgutils.for_range(builder, builder.add(first, index(ROWS))) as other:
                loaded = [load(errors, other.index, vector) for vector in range(_VECTORS)]
                for row in range(ROWS):
                    number = builder.add(builder.mul(other.index, index(ROWS)), index(row))
                    offset = builder.mul(number, index(_BYTES))
                    pointer = at(builder, start, offset, ir.FloatType())
                    factor = spread(builder, builder.load(pointer, align=_BYTES), _FLOATS)
                    for vector in range(_VECTORS):
                        add(tile[row, vector], factor, loaded[vector])
            for (row, vector), place in tile.items():
                own = load(errors, builder.add(first, index(row)), vector)
                add(costs[vector], own, builder.load(place))
        for vector, place in enumerate(costs):
            there = at(builder, result, index(vector * _WIDTH * _BYTES), _FLOATS)
            builder.store(builder.load(place), there, align=_BYTES)
        return context.get_dummy_value()

    return types.void(factors, linear, error, cost), generate


_sum_costs = cast(Callable[[Floats, Floats, Floats, Floats], None], intrinsic(_generate_cost))
"""Write e H e^T + 2 e l of each lane, for factors [g/r, g, r], 2 l [g, lanes] and e [g, lanes]."""


@compiled
def _load(source: Floats, first: int, column: int, factor: np.float32, lanes: Floats) -> None:
    """Load columns of some rows times a factor into lanes; the last row stands in for those after
    it."""
    last = source.shape[0] - 1
    for lane in range(LANES):
        row = min(first + lane, last)
        for place in range(lanes.shape[0]):
            lanes[place, lane] = source[row, column + place] * factor


@compiled
def _round(
    weight: Floats, channel: Floats, step: Floats, low: Floats, high: Floats, error: Floats
) -> None:
    """Write the errors [g, lanes] of rounding to nearest, as `scale_candidates.rounding_error`."""
    for column in range(weight.shape[0]):
        for lane in range(LANES):
            own = step[lane] / channel[column, lane] if len(channel) else step[lane]
            code = hold_and_round(weight[column, lane] / own, low[lane], high[lane])
            error[column, lane] = code * own - weight[column, lane]


@compiled
def choose_jointly(
    weights: Floats,
    channels: Floats,
    column: int,
    steps: Floats,
    offsets: Floats,
    smallest: int,
    largest: int,
    factors: Floats,
    linear: Floats,
    errors: Floats,
    found: NDArray[np.int64],
    costs: Floats,
    start: int,
    stop: int,
) -> None:
    """`joint_cheapest.cheapest_jointly` for rows in sets of `LANES`, from `start` to `stop`.

    Args:
        weights, errors: [R, I], of which the group begins at `column`. channels: the same, or no
            rows where there are no channel scales.
        steps, offsets: of the candidates, [C, R].
        factors: see `_sum_costs`. linear: l, [R, g].
        found: [R, 1], receives the candidates; costs: [2, R], of the first one and of this one.
    """
    rows, size, candidates = weights.shape[0], linear.shape[1], steps.shape[0]
    weight, doubled, error = (
        np.empty((size, LANES), np.float32),
        np.empty((size, LANES), np.float32),
        np.empty((size, LANES), np.float32),
    )
    channel = np.empty((size if len(channels) else 0, LANES), np.float32)
    tried, low, high = (
        np.empty((candidates, LANES), np.float32),
        np.empty((candidates, LANES), np.float32),
        np.empty((candidates, LANES), np.float32),
    )
    step, lowest, highest, cost, best = (
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )
    chosen = np.empty(LANES, np.int64)
    for first in range(start * LANES, min(stop * LANES, rows), LANES):
        _load(weights, first, column, np.float32(1), weight)
        _load(linear, first, 0, np.float32(2), doubled)
        if len(channels):
            _load(channels, first, column, np.float32(1), channel)
        for candidate in range(candidates):
            for lane in range(LANES):
                row = min(first + lane, rows - 1)
                tried[candidate, lane] = steps[candidate, row]
                low[candidate, lane] = np.float32(smallest) - offsets[candidate, row]
                high[candidate, lane] = np.float32(largest) - offsets[candidate, row]
        for candidate in range(candidates):
            _round(weight, channel, tried[candidate], low[candidate], high[candidate], error)
            _sum_costs(factors, doubled, error, cost)
            for lane in range(LANES):
                if candidate == 0 or cost[lane] < best[lane]:
                    best[lane] = cost[lane]
                    chosen[lane] = candidate
            if candidate == 0:
                for lane in range(min(LANES, rows - first)):
                    costs[0, first + lane] = cost[lane]
        for lane in range(LANES):
            step[lane] = tried[chosen[lane], lane]
            lowest[lane] = low[chosen[lane], lane]
            highest[lane] = high[chosen[lane], lane]
        _round(weight, channel, step, lowest, highest, error)
        for lane in range(min(LANES, rows - first)):
            found[first + lane, 0] = chosen[lane]
            costs[1, first + lane] = best[lane]
            for place in range(size):
                errors[first + lane, column + place] = error[place, lane]
