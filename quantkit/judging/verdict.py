"""From measurements to a verdict (docs/gate.md, "Verdict")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from quantkit.judging.statistics import mean_intervals
from quantkit.judging.words import name_check
from quantkit.recipe import GateSpec
from quantkit.records import Check, EvalResult, Judgement, Metric, Verdict

MIN_WINDOWS = 8
"""Fewer windows decide nothing: below, an interval says more about chance than about the model."""

_LARGEST_EXPONENT = 700.0
"""exp() of more overflows; no limit is anywhere near, and JSON has no infinity."""


def judge(result: EvalResult, spec: GateSpec, *, suspicions: Sequence[str] = ()) -> Judgement:
    """Judge what was measured by the limits of `spec`.

    Every limit that is set gives a check: PASS when the whole confidence interval is within the
    limit, FAIL when it is wholly outside, else INCONCLUSIVE. The artifact fails if a check fails
    or if anything is suspicious; it passes if every check passes, and there is one. With fewer
    than `MIN_WINDOWS` windows, or without a limit, nothing can pass.

    Args:
        result: both models on the same windows.
        spec: limits, confidence and the seed of the bootstrap.
        suspicions: what other checks found; each fails the artifact.
    """
    windows = len(result.kl)
    doubts = [*_find_doubts(result), *result.suspicions, *suspicions]
    if not _all_finite(result):
        return Judgement(
            "FAIL", (), tuple(doubts), None, None, None, spec.confidence, windows, result.versions
        )
    perplexity, kl, agreement = _measure(result, spec)
    checks = _check_limits(spec, perplexity, kl, agreement, windows)
    reasons = list(doubts)
    if windows >= MIN_WINDOWS:
        reasons += [_explain(check, spec) for check in checks if check.verdict != "PASS"]
    else:
        reasons.append(
            f"too few evaluation windows to judge: {windows}, and at least {MIN_WINDOWS} are needed"
            " (more evaluation data, or a shorter gate.sequence_length)"
        )
    if not checks:
        reasons.append("the recipe sets no limit, so nothing was judged: set one under gate")
    verdict = _combine(checks)
    return Judgement(
        verdict="FAIL" if doubts else verdict,
        checks=checks,
        reasons=tuple(reasons),
        perplexity=perplexity,
        kl=kl,
        top1_agreement=agreement,
        confidence=spec.confidence,
        windows=windows,
        measured_with=result.versions,
    )


def _all_finite(result: EvalResult) -> bool:
    numbers = (*result.baseline_nll, *result.candidate_nll, *result.kl, *result.agreement)
    return bool(result.kl) and all(map(math.isfinite, numbers)) and result.finite


def _find_doubts(result: EvalResult) -> list[str]:
    """Return the suspicions that the measurements themselves give."""
    if not result.kl:
        return ["nothing was measured: no window was scored"]
    if not _all_finite(result):
        whose = "one of the two models'"
        if not all(map(math.isfinite, result.candidate_nll)):
            whose = "the artifact's"
        if not all(map(math.isfinite, result.baseline_nll)):
            whose = "the baseline's"
        lost = sum(not math.isfinite(value) for value in result.kl)
        return [
            f"not finite: {whose} logits hold a NaN or an infinity"
            f" (it spoils {lost} of {len(result.kl)} windows)"
        ]
    if result.kl_max == 0:
        return [
            "KL is exactly zero at every position: the artifact computes what the baseline does,"
            " so it is a copy of it and not a quantized model"
        ]
    return []


def _measure(result: EvalResult, spec: GateSpec) -> tuple[Metric, Metric, Metric]:
    """Return perplexity, KL and top-1 agreement, with intervals from the same resamples."""
    base = np.array(result.baseline_nll)
    difference = np.array(result.candidate_nll) - base
    columns = np.stack([difference, np.array(result.kl), np.array(result.agreement)], axis=1)
    bounds = mean_intervals(columns, spec.confidence, spec.seed)
    means = columns.mean(axis=0)
    perplexity = Metric(
        value=_exp(float(base.mean() + means[0])),
        # exp is monotone: the bounds of the mean difference become those of the increase.
        low=_increase(bounds[0, 0]),
        high=_increase(bounds[0, 1]),
        baseline=_exp(float(base.mean())),
        increase=_increase(means[0]),
    )
    kl = Metric(
        value=float(means[1]),
        low=float(bounds[1, 0]),
        high=float(bounds[1, 1]),
        p99=result.kl_p99,
        maximum=result.kl_max,
    )
    agreement = Metric(float(means[2]), float(bounds[2, 0]), float(bounds[2, 1]))
    return perplexity, kl, agreement


def _check_limits(
    spec: GateSpec, perplexity: Metric, kl: Metric, agreement: Metric, windows: int
) -> tuple[Check, ...]:
    assert perplexity.increase is not None
    rows = [
        ("max_perplexity_increase", spec.max_perplexity_increase, perplexity.increase, perplexity),
        ("max_kl", spec.max_kl, kl.value, kl),
        ("min_top1_agreement", spec.min_top1_agreement, agreement.value, agreement),
    ]
    return tuple(
        Check(
            name=name,
            limit=limit,
            value=value,
            low=metric.low,
            high=metric.high,
            verdict=_compare(name, limit, metric) if windows >= MIN_WINDOWS else "INCONCLUSIVE",
        )
        for name, limit, value, metric in rows
        if limit is not None
    )


def _compare(name: str, limit: float, metric: Metric) -> Verdict:
    if name.startswith("max_"):
        within, outside = metric.high <= limit, metric.low > limit
    else:
        within, outside = metric.low >= limit, metric.high < limit
    if within:
        return "PASS"
    return "FAIL" if outside else "INCONCLUSIVE"


def _combine(checks: Sequence[Check]) -> Verdict:
    verdicts = {check.verdict for check in checks}
    if "FAIL" in verdicts:
        return "FAIL"
    return "PASS" if verdicts == {"PASS"} else "INCONCLUSIVE"


def _explain(check: Check, spec: GateSpec) -> str:
    """One sentence on a check that did not pass."""
    words, is_percentage = name_check(check.name)
    value, low, high, limit = _write_apart(
        (check.value, check.low, check.high, check.limit), is_percentage
    )
    side = "above" if check.name.startswith("max_") else "below"
    place = f"{side} the limit" if check.verdict == "FAIL" else "not proven to be within the limit"
    return (
        f"{words} of {value} ({100 * spec.confidence:g}% interval {low} to {high}) is {place}"
        f" of {limit}"
    )


def _write_apart(numbers: Sequence[float], is_percentage: bool) -> list[str]:
    """Write numbers with four digits, or up to eight to tell different ones apart."""
    factor, sign = (100, "%") if is_percentage else (1, "")
    texts: list[str] = []
    for digits in range(4, 9):
        texts = [f"{factor * number:.{digits}g}{sign}" for number in numbers]
        if len(set(texts)) == len(set(numbers)):
            break
    return texts


def _increase(difference: float) -> float:
    return math.expm1(min(float(difference), _LARGEST_EXPONENT))


def _exp(nll: float) -> float:
    return math.exp(min(nll, _LARGEST_EXPONENT))
