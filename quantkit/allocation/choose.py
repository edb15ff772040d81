"""One option for each unit, so that the sum of costs is small and the sum of weights is bounded.

This is the multiple-choice knapsack problem. A table holds the least cost for every sum of weights,
counted in bins that are as fine as they have to be, or as the table's length allows. With weights
rounded down to whole bins the choice is as good as any; if it does not keep the limit, they are
rounded up, and what that leaves over is used up by moves of single units and exchanges between
two, as long as one helps. Nothing is drawn at random, and of equal choices the first is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_BINS = 1 << 16
_LEAST_GAIN = 1e-12
"""Relative to the largest cost; below it an exchange would chase rounding errors."""


@dataclass(frozen=True)
class Option:
    """What a unit can get: its cost is to be made small, its weight counts against the limit."""

    cost: float
    weight: int


def choose(units: Sequence[Sequence[Option]], limit: int) -> tuple[int, ...]:
    """Return the index of the chosen option of each unit.

    Raises:
        ValueError: even the lightest options weigh more than the limit.
    """
    lightest = [min(option.weight for option in options) for options in units]
    slack = limit - sum(lightest)
    if slack < 0:
        raise ValueError(f"the lightest options weigh {sum(lightest)}, more than {limit}")
    extra = [
        [option.weight - least for option in options]
        for options, least in zip(units, lightest, strict=True)
    ]
    size = max(1, -(-slack // _MOST_BINS))
    chosen: list[int] = []
    for round_up in (False, True):
        bins = [[(weight + round_up * (size - 1)) // size for weight in row] for row in extra]
        chosen = _fill_table(units, bins, slack // size)
        left = slack - sum(row[index] for row, index in zip(extra, chosen, strict=True))
        if left >= 0:
            break
    _exchange(units, chosen, left)
    return tuple(chosen)


def _fill_table(
    units: Sequence[Sequence[Option]], weights: Sequence[Sequence[int]], limit: int
) -> list[int]:
    """Return the best choice by the weights in whole bins, of which each unit has one of 0."""
    best = np.zeros(limit + 1)
    table = np.zeros((len(units), limit + 1), dtype=np.int16)
    for unit, (options, row) in enumerate(zip(units, weights, strict=True)):
        found = np.full(limit + 1, np.inf)
        for index, (option, weight) in enumerate(zip(options, row, strict=True)):
            if weight <= limit:
                cost = best[: limit + 1 - weight] + option.cost
                better = cost < found[weight:]
                found[weight:][better] = cost[better]
                table[unit, weight:][better] = index
        best = found
    chosen, left = [0] * len(units), limit
    for unit in reversed(range(len(units))):
        chosen[unit] = int(table[unit, left])
        left -= weights[unit][chosen[unit]]
    return chosen


def _exchange(units: Sequence[Sequence[Option]], chosen: list[int], slack: int) -> None:
    """Change the option of one unit or of two as long as that saves something."""
    owner = np.array([unit for unit, options in enumerate(units) for _ in options], dtype=np.int64)
    costs = np.array([float(option.cost) for options in units for option in options])
    weights = np.array([option.weight for options in units for option in options], dtype=np.int64)
    starts = np.cumsum([0, *(len(options) for options in units)])[:-1]
    least = _LEAST_GAIN * float(np.abs(costs).max(initial=0.0))
    single = np.eye(len(costs), dtype=bool)
    while len(units):
        current = starts + np.array(chosen, dtype=np.int64)
        change = costs - costs[current][owner]
        weight = weights - weights[current][owner]
        # On the diagonal stand the moves of one unit alone.
        together = np.where(single, change, change[:, None] + change)
        added = np.where(single, weight, weight[:, None] + weight)
        together[(added > slack) | ((owner[:, None] == owner) & ~single)] = np.inf
        first, second = divmod(int(together.argmin()), len(costs))
        if not together[first, second] < -least:
            return
        for move in (first, second):
            chosen[owner[move]] = int(move - starts[owner[move]])
        slack -= int(added[first, second])
