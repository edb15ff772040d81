"""Which part of the range of a tensor unsigned 8-bit codes should cover, from a histogram.

A narrow range has small steps and clips more. `percentile` cuts the same share of values at either
end. `mse` weighs both errors: the square of a clipped value's distance from the range, and
step^2 / 12 for every other. `entropy` is the calibration of TensorRT (S. Migacz, "8-bit Inference
with TensorRT", GTC 2017) as ONNX Runtime has it for ranges that are not symmetric: of the windows
around zero it takes the one whose distribution, merged into the codes, has the smallest divergence
from the clipped original.

Letters of shapes: B bins.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]

LEVELS = 256
"""Codes that a range is divided among."""

_SHRINKING = 2.0 ** (-np.arange(33) / 8)
"""Ends to try relative to the outermost ones: down to a sixteenth."""
_ROUNDS = 3
_WINDOWS = 128
"""Windows that `entropy` compares at the most."""
_EMPTY = 1e-4
"""What an empty bin of the merged distribution has of a mean bin's share, so that the divergence
is finite."""


def find_range(
    counts: np.ndarray, minimum: float, maximum: float, method: str, percentile: float = 99.99
) -> tuple[float, float]:
    """Return the ends of the range that codes should cover; zero lies in it.

    Args:
        counts: [B], how many values (or how much weight) lie in each of B equal bins.
        minimum: where the first bin starts; maximum: where the last one ends.
        method: minmax, percentile, mse or entropy.
        percentile: share of the values that is kept, in percent.

    Raises:
        ValueError: an end is not finite, the ends are in the wrong order, the histogram is empty,
            or the method is unknown.
    """
    if method not in get_args(RangeMethod):
        raise ValueError(f"range method {method!r} is none of {', '.join(get_args(RangeMethod))}")
    if not (math.isfinite(minimum) and math.isfinite(maximum) and minimum <= maximum):
        raise ValueError(f"no range from {minimum} to {maximum}")
    weights = np.asarray(counts, dtype=np.float64)
    if not len(weights) or weights.min() < 0 or not weights.sum() > 0:
        raise ValueError("a histogram without values")
    whole = min(minimum, 0.0), max(maximum, 0.0)
    if method == "minmax" or minimum == maximum:
        return whole
    edges = np.linspace(minimum, maximum, len(weights) + 1)
    if method == "percentile":
        found = _cut_tails(weights, edges, percentile)
    elif method == "mse":
        found = _least_squares(weights, edges, whole)
    else:
        found = _least_divergence(weights, edges)
    return max(whole[0], min(found[0], 0.0)), min(whole[1], max(found[1], 0.0))


def _cut_tails(weights: np.ndarray, edges: np.ndarray, percentile: float) -> tuple[float, float]:
    """Cut half of what is not kept at either end, in between the edges of bins where need be."""
    share = np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()
    tail = (1.0 - percentile / 100.0) / 2
    # Where bins are empty the range is the narrower one.
    low = np.interp(tail, share, edges) if tail > 0 else edges[0]
    high = -np.interp(tail, 1.0 - share[::-1], -edges[::-1]) if tail > 0 else edges[-1]
    return float(low), float(high)


def _least_squares(
    weights: np.ndarray, edges: np.ndarray, whole: tuple[float, float]
) -> tuple[float, float]:
    """Move one end after the other to where the expected squared error is the smallest."""
    centres = (edges[:-1] + edges[1:]) / 2
    low, high = whole

    def error(low: float, high: float) -> float:
        outside = np.maximum(low - centres, 0.0) + np.maximum(centres - high, 0.0)
        inside = float(weights[outside == 0.0].sum())
        step = (high - low) / (LEVELS - 1)
        return float(weights @ outside**2) + inside * step**2 / 12

    for _ in range(_ROUNDS):
        lows = whole[0] * _SHRINKING
        low = float(lows[np.argmin([error(each, high) for each in lows])])
        highs = whole[1] * _SHRINKING
        high = float(highs[np.argmin([error(low, each) for each in highs])])
    return low, high


def _least_divergence(weights: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Compare windows of bins around zero."""
    bins = len(weights)
    zero = int(np.clip(np.searchsorted(edges, 0.0, side="right") - 1, 0, bins - 1))
    widest = max(zero + 1, bins - zero)
    # A window of no more bins than there are codes loses nothing in the merger.
    narrowest = min(LEVELS // 2, widest)
    best, found = math.inf, (float(edges[0]), float(edges[-1]))
    step = max(1, (widest - narrowest) // _WINDOWS)
    for half in [*range(narrowest, widest, step), widest]:
        start, stop = max(0, zero + 1 - half), min(bins, zero + half)
        divergence = _merge_divergence(weights, start, stop)
        # The wider of equals: clipping must gain something.
        if divergence <= best:
            best, found = divergence, (float(edges[start]), float(edges[stop]))
    return found


def _merge_divergence(weights: np.ndarray, start: int, stop: int) -> float:
    """Return KL(clipped || merged) of the bins from `start` to `stop`, in nats."""
    inside = weights[start:stop]
    if not inside.sum() > 0:
        return math.inf
    clipped = inside.copy()
    clipped[0] += weights[:start].sum()
    clipped[-1] += weights[stop:].sum()
    code = np.arange(len(inside)) * LEVELS // max(len(inside), LEVELS)
    filled = (inside > 0).astype(np.float64)
    mass = np.bincount(code, inside)
    places = np.bincount(code, filled)
    merged = np.divide(mass, places, out=np.zeros_like(mass), where=places > 0)[code] * filled
    p, q = clipped / clipped.sum(), merged / merged.sum()
    q = np.maximum(q, _EMPTY / len(q))
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / (q[some] / q.sum()))))
