"""Numbers rounded for people; report.json alone has them unrounded."""

from __future__ import annotations

import math
from itertools import pairwise

ABSENT = "–"
NOT_FINITE = "not finite"

_LONGEST = 1e7
"""From here on numbers are written with an exponent."""


def format_bytes(size: int) -> str:
    """Return decimal units with three significant digits: `12.4 MB`."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{format_significant(value)} {unit}"


def format_significant(value: float | None, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, without an exponent where that is short."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    # The exponent after rounding: 0.9996 is 1.00 with three digits.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if exponent <= -5 or abs(value) >= _LONGEST:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def format_percent(fraction: float | None, digits: int = 3) -> str:
    """Return a fraction as a percentage with `digits` significant digits: `1.83%`."""
    if fraction is None or not math.isfinite(fraction):
        return ABSENT if fraction is None else NOT_FINITE
    return f"{format_significant(100 * fraction, digits)}%"


def format_ratio(size: int, baseline: int) -> str:
    """Say how much smaller (or larger) `size` is than `baseline`: `3.66× smaller`."""
    if size <= 0 or baseline <= 0:
        return ABSENT
    word, ratio = ("smaller", baseline / size) if size <= baseline else ("larger", size / baseline)
    return f"{format_significant(ratio)}× {word}"


def format_count(number: int, noun: str) -> str:
    """Return a number of things: `1 probe`, `2,048 tokens`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_seconds(seconds: float) -> str:
    """Return a duration: `0.31 s`, `12.3 s`, `3 min 20 s`, `2 h 5 min`."""
    if not math.isfinite(seconds) or seconds < 0:
        return NOT_FINITE if not math.isfinite(seconds) else f"{seconds:g} s"
    if seconds < 60:
        return f"{format_significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_together(
    numbers: tuple[float, ...], *, percent: bool = False, sign: bool = False
) -> tuple[str, ...]:
    """Round a value, the ends of its interval and perhaps its limit to the same decimals.

    Three significant digits of the largest number; more, up to five, where two of the numbers
    would look equal without: `3.02%` against a limit of `3.00%`.
    """
    scale = 100.0 if percent else 1.0
    finite = sorted({number * scale for number in numbers if math.isfinite(number)})
    largest = max((abs(number) for number in finite), default=0.0)
    leading = 2 - math.floor(math.log10(largest)) if largest else 0
    gaps = [high - low for low, high in pairwise(finite)]
    telling = math.ceil(-math.log10(min(gaps))) if gaps else 0
    decimals = min(8, max(0, leading, min(telling, leading + 2)))
    form = ".3g" if largest >= _LONGEST else f".{decimals}f"
    plus = "+" if sign else ""
    end = "%" if percent else ""
    # Rounded before it is written: a minus before a zero says nothing.
    return tuple(
        f"{round(number * scale, decimals) + 0.0:{plus}{form}}{end}"
        if math.isfinite(number)
        else NOT_FINITE
        for number in numbers
    )


def format_divergences(*numbers: float) -> tuple[str, ...]:
    """Round divergences, the ends of an interval and perhaps a limit, wherever they are shown.

    Three significant digits of each: they reach over many powers of ten. More, up to five, where
    two of the numbers would look equal without.
    """
    finite = {number for number in numbers if math.isfinite(number)}
    digits = 3
    while digits < 5 and len({format_significant(each, digits) for each in finite}) < len(finite):
        digits += 1
    return tuple(format_significant(number, digits) for number in numbers)


def format_pair(first: float, second: float) -> tuple[str, str]:
    """Round two numbers to four significant digits, or to more where they would look equal."""
    digits = count_digits(first, second, 4)
    return format_significant(first, digits), format_significant(second, digits)


def count_digits(first: float, second: float, fewest: int = 3) -> int:
    """Return how many significant digits tell two numbers apart: from `fewest` to seven."""
    if first == second:
        return fewest
    for digits in range(fewest, 7):
        if format_significant(first, digits) != format_significant(second, digits):
            return digits
    return 7
