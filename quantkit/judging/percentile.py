"""What the gate and its reports know of the percentile that is judged; light to import."""

from __future__ import annotations

import math

PERCENTILE = 0.01
"""Which percentile of the cosine is judged, as a share."""

LOWEST_COSINE = -1.0
"""The lower bound of a percentile that no value bounds."""


def texts_for_percentile(confidence: float) -> int:
    """Return how many texts are needed for one of them to bound the percentile from below.

    The smallest of N values lies above the percentile with a probability of (1 - PERCENTILE)**N,
    which has to be at most the tail of the two-sided interval.
    """
    return math.ceil(math.log((1 - confidence) / 2) / math.log(1 - PERCENTILE))
