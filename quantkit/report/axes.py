"""What the pictures of a report share: labelled places, and round values on a logarithmic axis."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    position: float
    label: str


def round_values(low: float, high: float) -> list[float]:
    """Return round values between 10**low and 10**high: decades, or 1-2-5 where those are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [
            factor * 10.0**decade
            for decade in decades
            for factor in factors
            if low <= math.log10(factor * 10.0**decade) <= high
        ]
        if len(found) >= 3:
            break
    return found
