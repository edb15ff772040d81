"""Geometry of a check's bar: limit, value and interval on one axis from 0 to 100."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantkit.records import Check


@dataclass(frozen=True)
class CheckBar:
    """One check as positions between 0 and 100."""

    limit: float
    low: float
    value: float
    high: float
    allowed_start: float
    allowed_end: float


def check_bar(check: Check, *, is_upper: bool, is_share: bool) -> CheckBar | None:
    """Lay out a check on an axis that holds the limit and the interval; None if not finite.

    `is_share`: the value cannot exceed 1, so the axis ends there.
    """
    numbers = (check.limit, check.low, check.value, check.high)
    if not all(map(math.isfinite, numbers)):
        return None
    low, high = min(numbers), max(numbers)
    if is_upper:
        start, end = min(0.0, low), high
        end += 0.15 * (end - start)
    else:
        start, end = low, 1.0 if is_share else high
        start -= 0.25 * (end - start)
    if not start < end:
        start, end = start - 0.5, start + 0.5

    def place(number: float) -> float:
        return round(100 * (number - start) / (end - start), 2)

    limit = place(check.limit)
    return CheckBar(
        limit=limit,
        low=place(check.low),
        value=place(check.value),
        high=place(check.high),
        allowed_start=0.0 if is_upper else limit,
        allowed_end=limit if is_upper else 100.0,
    )
