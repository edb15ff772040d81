"""A task's documents under both models: recovery, its interval, and what changed (docs/gate.md).

Letters of shapes: N documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from quantkit.errors import InputError
from quantkit.judging.statistics import mean_intervals
from quantkit.recipe.judging import MIN_WINDOWS
from quantkit.records import TaskResult
from quantkit.records.metrics import Verdict

Kind = Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte"]
"""How lm-eval makes one number of all documents, where they can be paired. A document gives a
number; for `perplexity` its log-likelihood; for the last two that and a weight."""

_HALVINGS = 60
"""Of the interval that holds a bound: below what float64 can tell."""


def score_task(
    name: str,
    metric: str,
    kind: Kind,
    values: tuple[Sequence[Any], Sequence[Any]],
    *,
    higher_is_better: bool,
    limit: float | None,
    confidence: float,
) -> TaskResult:
    """Compare both models on the same documents.

    Args:
        values: the baseline's and the artifact's, as lm-eval has them for each document.
        limit: lowest recovery that passes; None: the task decides nothing.

    Raises:
        InputError: the values cannot be compared.
    """
    where = f"task {name}, metric {metric}"
    numbers, weights = _read_values(where, kind, values)
    if kind == "mean":
        better = numbers if higher_is_better else -numbers
        scores = numbers.mean(axis=1)
    else:
        better = numbers
        scores = -numbers.sum(axis=1) / weights.sum()
        scores = scores / math.log(2) if kind == "bits_per_byte" else np.exp(scores)
    if kind in ("mean", "bits_per_byte"):
        costs = numbers if kind == "mean" else -numbers
        above, below = costs[::-1] if higher_is_better else costs
        if costs.mean(axis=1).min() < 0:
            raise InputError(f"{where}: has negative values, of which no share can be recovered")
        recovery = _divide(above, below, confidence)
    else:
        recovery = _compare_likelihoods(numbers[1] - numbers[0], weights, confidence)
    lost, won = (int((better[1] < better[0]).sum()), int((better[1] > better[0]).sum()))
    return TaskResult(
        name=name,
        metric=metric,
        higher_is_better=higher_is_better,
        samples=numbers.shape[1],
        baseline=float(scores[0]),
        artifact=float(scores[1]),
        recovery=recovery[0],
        low=recovery[1],
        high=recovery[2],
        p_value=mcnemar(lost, won) if kind == "mean" and _is_yes_or_no(numbers) else None,
        lost=lost,
        won=won,
        limit=limit,
        verdict=_judge(recovery[1], recovery[2], limit, numbers.shape[1]),
    )


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p-value of McNemar's test, exact: heads and tails of a fair coin.

    Of the documents on which the models differ, each is as likely lost as won where both models
    are equally good (McNemar, Psychometrika 1947).
    """
    changed = lost + won
    ways = tail = 1
    for count in range(1, min(lost, won) + 1):
        ways = ways * (changed - count + 1) // count
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def difference_interval(lost: int, won: int, count: int, confidence: float) -> tuple[float, float]:
    """Return the two-sided interval of the share won minus the share lost, of `count` documents.

    Tango's score interval (Statistics in Medicine 1998): the differences that a test, with the
    variance as that difference would have it, does not refuse. It has a width even where nothing
    was lost and nothing won.
    """
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)

    def score(difference: float) -> float:
        # The most likely share of lost documents, given the difference.
        linear = (2 * count - won + lost) * difference - won - lost
        root = math.sqrt(max(0.0, linear**2 + 8 * count * lost * difference * (1 - difference)))
        variance = count * ((root - linear) / (2 * count) + difference * (1 - difference))
        distance = won - lost - count * difference
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def find(low: float, high: float, target: float) -> float:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    seen = (won - lost) / count
    return find(-1.0, seen, quantile), find(seen, 1.0, -quantile)


def _read_values(
    where: str, kind: Kind, values: tuple[Sequence[Any], Sequence[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers float64 [2, N] and weights [N]; the weights are the same for both models."""
    shape = (2, len(values[0]), 2) if kind.startswith(("weighted", "bits")) else (2, len(values[0]))
    try:
        read = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        read = np.empty(0)
    if read.shape != shape or not np.isfinite(read).all():
        raise InputError(f"{where}: a document has no number as its value, so nothing is compared")
    if read.ndim == 2:
        return read, np.ones(read.shape[1])
    return read[..., 0], read[0, :, 1]


def _is_yes_or_no(numbers: np.ndarray) -> bool:
    return bool(((numbers == 0) | (numbers == 1)).all())


def _divide(above: np.ndarray, below: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Return the ratio of two means over the same documents [N], with its interval."""
    mean = float(below.mean())
    if mean == 0:
        # Nothing is there that could be lost or kept.
        return 1.0, 0.0, 1.0
    ratio = float(above.mean()) / mean
    if _is_yes_or_no(np.stack([above, below])):
        lost, won = int((above < below).sum()), int((above > below).sum())
        low, high = difference_interval(lost, won, len(above), confidence)
        return ratio, max(0.0, 1 + low / mean), 1 + high / mean
    # The error of a ratio, to the first order: that of what it leaves of each document.
    errors = ratio + (above - ratio * below) / mean
    low, high = mean_intervals(errors[:, None], confidence)[0]
    return ratio, max(0.0, float(low)), float(high)


def _compare_likelihoods(
    gains: np.ndarray, weights: np.ndarray, confidence: float
) -> tuple[float, float, float]:
    """Return baseline perplexity / artifact perplexity, with its interval.

    Args:
        gains: log-likelihood under the artifact minus that under the baseline [N].
        weights: words, or bytes, of each document [N].
    """
    gain = float(gains.sum() / weights.sum())
    errors = gain + (gains - gain * weights) / weights.mean()
    low, high = mean_intervals(errors[:, None], confidence)[0]
    return math.exp(gain), math.exp(float(low)), math.exp(float(high))


def _judge(low: float, high: float, limit: float | None, count: int) -> Verdict:
    if limit is None:
        return "UNJUDGED"
    if count < MIN_WINDOWS:
        return "INCONCLUSIVE"
    if low >= limit:
        return "PASS"
    return "FAIL" if high < limit else "INCONCLUSIVE"
