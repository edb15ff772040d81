"""How many windows an undecided check asks for; light to import."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantkit.records import Check

_HOPELESS = 50
"""So many times the windows are not worth naming: the value lies on its limit."""


def estimate_windows(checks: Sequence[Check], windows: int) -> int | None:
    """Return how many windows would decide all inconclusive checks, or None where hardly any do.

    An interval narrows with the square root of the windows; the value is taken to stay.
    """
    needed = windows + 1
    for check in checks:
        if check.verdict != "INCONCLUSIVE":
            continue
        margin = abs(check.limit - check.value)
        reach = check.high - check.value if check.limit > check.value else check.value - check.low
        times = reach / margin if margin > 0 else math.inf
        if not times * times <= _HOPELESS:
            # A report that was read again may hold a NaN, which no number of windows mends either.
            return None
        needed = max(needed, math.ceil(windows * times**2))
    return needed
