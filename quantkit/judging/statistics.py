"""Confidence intervals of means over windows or texts (docs/gate.md, "Intervals").

Letters of shapes: N windows, M metrics.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
"""Of the bootstrap, for what is no mean (`encoder_statistics`)."""

_SKEW_MARGIN = 16.0
"""Skewness towards a bound counts 1 + this / N times: few windows show too little of it."""


def mean_intervals(values: np.ndarray, confidence: float) -> np.ndarray:
    """Return the two-sided interval [M, 2] of the mean of each column of `values` float64 [N, M].

    Student's t with Hall's cubic correction for skewness (On the Removal of Skewness by
    Transformation, 1992): the bound on the side of the long tail lies further out than the other.
    Nothing is drawn by chance. With one window there is no spread: both bounds are its value.
    """
    count = len(values)
    means = values.mean(axis=0)
    spread = np.ptp(values, axis=0) if count > 1 else np.zeros(values.shape[1])
    # A mean of equal numbers may differ from them in its last digit.
    means = np.where(spread == 0, values[0], means)
    if count == 1:
        return np.stack([means, means], axis=1)
    deviations = values - means
    squares = np.sum(deviations**2, axis=0)
    errors = np.sqrt(squares / (count * (count - 1)))
    quantile = student_quantile(confidence, count - 1)
    skewness = _skewness(deviations, squares)
    low = means - errors * _reach(-skewness, quantile, count)
    high = means + errors * _reach(skewness, quantile, count)
    return np.stack([low, high], axis=1)


def student_quantile(confidence: float, freedom: int) -> float:
    """Return Student's t quantile of the two-sided `confidence`.

    The quantile is expanded around the normal one (Abramowitz and Stegun, 26.7.5): from 7 degrees
    of freedom on within 0.1 % at a confidence of 0.99, within 1 % at 0.999.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def widened_quantile(confidence: float, count: int) -> float:
    """Return sqrt(N/(N-1)) times Student's t quantile: for percentiles of resampled statistics.

    Percentiles of N values are too narrow, like a normal interval that divides by N and forgets
    Student's t (Hesterberg, What Teachers Should Know About the Bootstrap, 2015).
    """
    return student_quantile(confidence, count - 1) * math.sqrt(count / (count - 1))


def _skewness(deviations: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return the skewness [M] of N values, corrected for N; 0 where it cannot be told.

    Args:
        deviations: from the mean [N, M].
        squares: their sums of squares [M].
    """
    count = len(deviations)
    if count < 3:
        return np.zeros_like(squares)
    scale = np.where(squares > 0, squares, 1.0) ** 1.5
    factor = count * math.sqrt(count - 1) / (count - 2)
    return np.where(squares > 0, factor * np.sum(deviations**3, axis=0) / scale, 0.0)


def _reach(skewness: np.ndarray, quantile: float, count: int) -> np.ndarray:
    """Return how many standard errors [M] a bound lies from the mean.

    Args:
        skewness: [M], positive where the long tail is on the bound's side.
        quantile: Student's.
        count: N.
    """
    skew = skewness / math.sqrt(count)
    skew = np.where(skew > 0, skew * (1 + _SKEW_MARGIN / count), skew)
    # Beyond its crest the cube root would bring the bound nearer again.
    grid = np.linspace(0.01, 4, 400)
    crest = grid[np.argmax(_hall(grid, quantile))]
    return _hall(np.minimum(skew, crest), quantile)


def _hall(skew: np.ndarray, quantile: float) -> np.ndarray:
    """Hall's inverted cubic; where there is no skew, its limit: the quantile itself."""
    safe = np.where(np.abs(skew) < 1e-6, 1e-6, skew)
    return 3 / safe * (1 - np.cbrt(1 - safe * (quantile + safe / 6)))
