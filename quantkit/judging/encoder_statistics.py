"""Intervals of what resampled means do not give: rank correlation, F1, a percentile, a share.

Defined in docs/gate.md, "Encoders". Letters of shapes: N texts, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from quantkit.judging.percentile import LOWEST_COSINE, PERCENTILE
from quantkit.judging.statistics import RESAMPLES, widened_quantile

_CHUNK_COUNTS = 1 << 18
"""Counts that are drawn at a time; bounds memory, not the result's meaning."""


def resampled_interval(
    statistic: Callable[[np.ndarray], np.ndarray], count: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Return the percentile interval of a statistic of `count` rows drawn with replacement.

    The level is widened for few rows as that of the means (`widened_quantile`). With one row there
    is nothing to resample: both bounds are its value.

    Args:
        statistic: takes how often each row was drawn, float64 [R, N], and returns [R].
        count: rows.
        confidence: of the two-sided interval.
        seed: of the draw.
    """
    if count == 1:
        value = float(statistic(np.ones((1, 1)))[0])
        return value, value
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK_COUNTS // count)
    parts = []
    for start in range(0, RESAMPLES, step):
        draws = min(step, RESAMPLES - start)
        rows = generator.integers(0, count, size=(draws, count))
        flat = (rows + count * np.arange(draws)[:, None]).ravel()
        counts = np.bincount(flat, minlength=draws * count).reshape(draws, count)
        parts.append(statistic(counts.astype(np.float64)))
    quantile = widened_quantile(confidence, count)
    levels = [NormalDist().cdf(sign * quantile) for sign in (-1.0, 1.0)]
    low, high = np.quantile(np.concatenate(parts), levels)
    return float(low), float(high)


def percentile_interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the interval of the 1st percentile of cosines [N], from order statistics.

    Exact for any distribution (Conover, Practical Nonparametric Statistics, 3.2): how many of N
    values lie below the true percentile is binomial. Resampling cannot do that, for it never sees a
    value below the smallest. With too few texts no value bounds it from below: then -1 does.
    """
    ordered = np.sort(values)
    tail = (1 - confidence) / 2
    below = _binomial_cdf(len(values), PERCENTILE)
    # Value k is above the percentile when fewer than k values are below it.
    lower = int(np.searchsorted(below, tail, side="right"))
    low = float(ordered[lower - 1]) if lower > 0 else LOWEST_COSINE
    upper = int(np.searchsorted(below, 1 - tail, side="left"))
    return low, float(ordered[min(upper, len(values) - 1)])


def share_interval(hits: int, count: int, confidence: float) -> tuple[float, float]:
    """Return the interval of a share of which `hits` of `count` were seen.

    Exact (Clopper and Pearson, The Use of Confidence or Fiducial Limits, 1934). Resampling would
    call it certain that labels always agree when the few that there are do.
    """
    tail = (1 - confidence) / 2
    # The share at which as many hits or more (or as many or fewer) are as rare as the tail.
    low = _bisect(lambda share: 1 - _binomial_cdf(count, share)[hits - 1] - tail) if hits else 0.0
    if hits == count:
        return low, 1.0
    return low, _bisect(lambda share: tail - _binomial_cdf(count, share)[hits])


def _bisect(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def _binomial_cdf(count: int, share: float) -> np.ndarray:
    """Return [N + 1]: P(at most k of `count` draws are hits), each with a probability of `share`.

    Args:
        count: draws.
        share: within (0, 1).
    """
    hits = np.arange(count + 1)
    factorials = np.concatenate([[0.0], np.log(np.arange(1, count + 1)).cumsum()])
    logs = factorials[count] - factorials - factorials[::-1]
    logs += hits * math.log(share) + (count - hits) * math.log1p(-share)
    return np.exp(logs).cumsum()
