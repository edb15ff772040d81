"""Which artifacts of a comparison are told apart (docs/compare.md, "Differences")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np

from quantkit.judging.sampling import find_look_confidence
from quantkit.judging.statistics import mean_intervals, student_quantile
from quantkit.recipe import MIN_WINDOWS
from quantkit.records import Difference, Judgement, Metric


def find_differences(judgements: Mapping[str, Judgement]) -> tuple[Difference, ...]:
    """Return the paired difference of mean KL of each pair of artifacts, with its interval.

    Of each pair those windows count that both were measured on. The error that a judgement's
    confidence leaves is shared out over all pairs evenly (Bonferroni), so that all intervals hold
    together. A difference is significant where its interval excludes 0, and there are `MIN_WINDOWS`
    windows.

    Args:
        judgements: artifact -> what the gate found, in the order of the report; whoever has no
            numbers of windows is left out.
    """
    measured = {
        name: dict(zip(judgement.details.windows, judgement.details.kl, strict=True))
        for name, judgement in judgements.items()
        if judgement.details is not None and judgement.details.kl
    }
    pairs = list(combinations(measured, 2))
    return tuple(
        _compare(
            (first, second),
            (measured[first], measured[second]),
            find_look_confidence(
                max(judgements[first].confidence, judgements[second].confidence), len(pairs)
            ),
        )
        for first, second in pairs
        if measured[first].keys() & measured[second].keys()
    )


def _compare(
    names: tuple[str, str], kl: tuple[Mapping[int, float], Mapping[int, float]], confidence: float
) -> Difference:
    """Compare two artifacts by the KL of each window, by its number."""
    common = [window for window in kl[0] if window in kl[1]]
    differences = np.array([kl[0][window] - kl[1][window] for window in common])
    low, high = _difference_interval(differences, confidence)
    return Difference(
        first=names[0],
        second=names[1],
        windows=len(common),
        kl=Metric(float(differences.mean()), low, high),
        significant=len(common) >= MIN_WINDOWS and (low > 0 or high < 0),
    )


def _difference_interval(differences: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the wider bound, to each side, of the gate's interval and of Student's.

    Of two artifacts that are alike the differences are symmetric, and skewness that a sample shows
    by chance would bring one bound too near; where they are skewed in truth, Student's is too near.

    Args:
        differences: float64 [N].
    """
    ((low, high),) = mean_intervals(differences[:, None], confidence)
    mean, count = float(differences.mean()), len(differences)
    if count > 1:
        error = float(differences.std(ddof=1)) / math.sqrt(count)
        reach = error * student_quantile(confidence, count - 1)
        low, high = min(low, mean - reach), max(high, mean + reach)
    return float(low), float(high)
