"""How often, and how surely, the gate may look at its windows (docs/gate.md, "More windows")."""

from __future__ import annotations

import math
from dataclasses import replace

from quantkit.calibration.windows import draw
from quantkit.recipe import MIN_WINDOWS
from quantkit.records import TokenWindows


def shuffle_windows(windows: TokenWindows, seed: int) -> TokenWindows:
    """Return the windows in a random order, the same for a seed, and their numbers in the data.

    Neighbours in a text resemble each other. In its order the windows of a look would tell of one
    stretch of it, with less spread than the text has, and the intervals would be too narrow.
    """
    order = draw(len(windows.ids), seed)
    return replace(
        windows,
        ids=windows.ids[order],
        weights=windows.weights[order],
        domains=None if windows.domains is None else windows.domains[order],
        numbers=order if windows.numbers is None else windows.numbers[order],
    )


def plan_looks(samples: int, available: int) -> tuple[int, ...]:
    """Return the numbers of windows at which the gate may decide, rising.

    Each look has twice the windows of the one before, and the last one all that there are. A look
    that would add less than half to the one before is not worth its share of the error. It depends
    on counts alone, so that it is settled before anything is measured.

    Args:
        samples: windows of the first look.
        available: windows that there are; at least 1.
    """
    looks = [min(max(samples, MIN_WINDOWS), available)]
    while 2 * looks[-1] <= available:
        looks.append(2 * looks[-1])
    if 2 * available >= 3 * looks[-1]:
        looks.append(available)
    elif len(looks) > 1:
        looks[-1] = available
    return tuple(looks)


def find_look_confidence(confidence: float, looks: int) -> float:
    """Return the confidence of each of several looks that together keep `confidence`.

    The error is shared out evenly (Bonferroni), which holds however the looks depend on each other;
    a share is cut to three digits.
    """
    if looks == 1:
        return confidence
    share = (1 - confidence) / looks
    unit = 10.0 ** (math.floor(math.log10(share)) - 2)
    return round(1 - math.floor(share / unit + 1e-6) * unit, 12)


def explain_windows(needed: int | None, windows: int, *, available: int, limit: int) -> str:
    """Return one sentence on what would decide.

    Args:
        needed: as `needing.estimate_windows` returns it.
        windows: that were measured.
        available: windows that were there to measure.
        limit: windows that the recipe allows.
    """
    if needed is None:
        return "a value lies on its limit: more evaluation windows will hardly decide"
    more = needed - windows
    if available < limit:
        where = f"the evaluation data holds {available}: give more text"
    else:
        where = f"gate.max_samples allows {limit}: raise it"
    return (
        f"{windows} evaluation windows do not decide: at least {more} more are needed, by their "
        f"spread ({needed} in all), and {where}"
    )
