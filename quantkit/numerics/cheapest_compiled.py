"""The loop of `cheapest` over scales, compiled by numba, an optional package.

The weights of a group stay in the core's cache while one scale after the other is tried on them.
Columns lie side by side in the lanes of vector instructions, so the sum over them takes whatever
order suits those; all else is float32 as written, and numba's fast math stays off.

The kernel lets go of Python's lock. Importing this module raises ImportError where numba is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from quantkit.numerics.fused import ROUNDING, Floats, fused
from quantkit.numerics.ggml.kernels import compiled

_LEAST = np.finfo(np.float32).tiny
"""The smallest normal number."""

_GROUPS = 64
"""Whose scales are loaded at once: a group's own lie far apart, at addresses that compete for the
same places of the cache."""

Codes = NDArray[np.int8]


def _generate_sum(_: Any, total: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float32(types.float32, types.float32), generate


_add = cast(Callable[[np.float32, np.float32], np.float32], intrinsic(_generate_sum))
"""Return a sum whose additions the compiler may put in another order, so that it can vectorize."""


@compiled
def _cost(
    weight: Floats,
    importance: Floats,
    step: np.float32,
    inverse: np.float32,
    low: np.float32,
    high: np.float32,
) -> np.float32:
    """Return sum_j v_j e_j^2 of a group [g]; low and high bound codes plus `ROUNDING`."""
    total = np.float32(0)
    for column in range(weight.shape[0]):
        # Times the inverse, which may err at a tie alone, where both codes cost the same.
        shifted = fused(weight[column], inverse, ROUNDING)
        # Written so that a value that is not a number stays so.
        shifted = low if shifted < low else shifted
        shifted = high if shifted > high else shifted
        error = fused(shifted - ROUNDING, step, -weight[column])
        total = _add(total, error * error * importance[column])
    return total


@compiled
def _load_steps(
    scales: Floats, unit: Floats, first: int, count: int, steps: Floats, inverses: Floats
) -> None:
    """Load the steps of some groups under each scale, and their inverses, [C, groups]."""
    for candidate in range(scales.shape[0]):
        for place in range(count):
            step = scales[candidate, first + place] / unit[first + place]
            # See `numerics.affine.relative_steps`.
            step = _LEAST if abs(step) < _LEAST else step
            steps[candidate, place] = step
            inverses[candidate, place] = np.float32(1) / step


@compiled
def _load_limits(
    zero_points: Codes,
    first: int,
    count: int,
    smallest: int,
    largest: int,
    low: Floats,
    high: Floats,
) -> None:
    """Write the limits of codes less zero points, plus `ROUNDING`, [C, groups]."""
    for candidate in range(zero_points.shape[0]):
        for place in range(count):
            offset = zero_points[candidate, first + place]
            low[candidate, place] = np.float32(smallest - offset) + ROUNDING
            high[candidate, place] = np.float32(largest - offset) + ROUNDING


@compiled
def choose_cheapest(
    grouped: Floats,
    unit: Floats,
    scales: Floats,
    zero_points: Codes | None,
    importance: Floats,
    smallest: int,
    largest: int,
    found: NDArray[np.int64],
    start: int,
    stop: int,
) -> None:
    """`cheapest.cheapest_scales` for the groups from `start` to `stop` of all N = R G.

    Args:
        grouped: [N, g]. unit: [N]. scales: float32 [C, N]. zero_points: [C, N] or None.
        importance: [N, g], or [G, g] for all rows.
        smallest, largest: of the codes.
        found: [N], receives the candidates.
    """
    candidates = scales.shape[0]
    steps, inverses = (
        np.empty((candidates, _GROUPS), np.float32),
        np.empty((candidates, _GROUPS), np.float32),
    )
    low, high = (
        np.full((candidates, _GROUPS), np.float32(smallest) + ROUNDING, np.float32),
        np.full((candidates, _GROUPS), np.float32(largest) + ROUNDING, np.float32),
    )
    for first in range(start, stop, _GROUPS):
        count = min(_GROUPS, stop - first)
        _load_steps(scales, unit, first, count, steps, inverses)
        if zero_points is not None:
            _load_limits(zero_points, first, count, smallest, largest, low, high)
        for place in range(count):
            weight = grouped[first + place]
            costs = importance[(first + place) % importance.shape[0]]
            best, least = 0, np.float32(0)
            for candidate in range(candidates):
                cost = _cost(
                    weight,
                    costs,
                    steps[candidate, place],
                    inverses[candidate, place],
                    low[candidate, place],
                    high[candidate, place],
                )
                if candidate == 0 or cost < least:
                    best, least = candidate, cost
            found[first + place] = best
