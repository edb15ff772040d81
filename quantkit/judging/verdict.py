"""From measurements to a verdict (docs/gate.md, "Verdict")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from quantkit.judging.checks import combine_checks, compare_limit, explain_check, explain_task
from quantkit.judging.custom_checks import explain_custom
from quantkit.judging.details import LARGEST_EXPONENT, describe_details
from quantkit.judging.needing import estimate_windows
from quantkit.judging.sampling import explain_windows, find_look_confidence
from quantkit.judging.statistics import mean_intervals
from quantkit.recipe import MIN_WINDOWS, GateSpec
from quantkit.records import Check, EvalResult, Judgement, Metric


def judge(result: EvalResult, spec: GateSpec, *, suspicions: Sequence[str] = ()) -> Judgement:
    """Judge what was measured by the limits of `spec`.

    Every limit that is set gives a check: PASS when the whole confidence interval is within the
    limit, FAIL when it is wholly outside, else INCONCLUSIVE. The artifact fails if a check, a task,
    a probe or a check of the user's own fails, or if anything is suspicious; it passes if every
    check and every task with a limit passes, and there is one.
    With fewer than `MIN_WINDOWS` windows, or without a limit, nothing can pass. Where the result is
    one of several `looks`, intervals are as wide as all of them together need.

    Args:
        result: both models on the same windows.
        spec: limits and confidence.
        suspicions: what other checks found; each fails the artifact.
    """
    windows = len(result.kl)
    doubts = [*_find_doubts(result), *result.suspicions, *suspicions]
    failed = [probe.detail for probe in result.probes if probe.verdict == "FAIL"]
    failed += [explain_custom(each) for each in result.custom_checks if each.verdict == "FAIL"]
    confidence = find_look_confidence(spec.confidence, max(1, len(result.looks)))
    notes = (*result.notes, *_note_look(result, spec, confidence))
    if spec.tokenizer == "fail":
        doubts += result.tokenizer_findings
    else:
        notes += result.tokenizer_findings
    if not _all_finite(result):
        return Judgement(
            verdict="FAIL",
            checks=(),
            reasons=(*doubts, *failed),
            perplexity=None,
            kl=None,
            top1_agreement=None,
            confidence=confidence,
            windows=windows,
            measured_with=result.versions,
            looks=result.looks,
            notes=notes,
            probes=result.probes,
            tasks=result.tasks,
            custom_checks=result.custom_checks,
        )
    perplexity, kl, agreement = _measure(result, confidence)
    checks = _check_limits(spec, perplexity, kl, agreement, windows)
    # A task without a limit decides nothing.
    asked = [task for task in result.tasks if task.limit is not None]
    verdict = "FAIL" if doubts or failed else combine_checks([*checks, *asked])
    if verdict == "PASS" and windows < MIN_WINDOWS:
        # Tasks alone may pass; they do not stand in for the windows.
        verdict = "INCONCLUSIVE"
    return Judgement(
        verdict=verdict,
        checks=checks,
        reasons=(
            *doubts,
            *failed,
            *_explain(windows, checks, confidence, has_limit=bool(checks or asked)),
            *(explain_task(task, spec.confidence) for task in asked if task.verdict != "PASS"),
            *(_want_windows(result, spec, checks) if verdict == "INCONCLUSIVE" else ()),
        ),
        perplexity=perplexity,
        kl=kl,
        top1_agreement=agreement,
        confidence=confidence,
        windows=windows,
        measured_with=result.versions,
        looks=result.looks,
        notes=notes,
        details=describe_details(result, confidence),
        probes=result.probes,
        tasks=result.tasks,
        custom_checks=result.custom_checks,
    )


def _note_look(result: EvalResult, spec: GateSpec, confidence: float) -> tuple[str, ...]:
    """Say why the intervals are wider than the recipe's confidence."""
    if len(result.looks) < 2:
        return ()
    *others, last = map(str, result.looks)
    return (
        f"judged after {len(result.kl)} windows; the gate may decide after {', '.join(others)} or "
        f"{last}, so each decision uses {100 * confidence:g}% intervals, which keeps the "
        f"confidence of all of them together at {100 * spec.confidence:g}%",
    )


def _explain(
    windows: int, checks: Sequence[Check], confidence: float, *, has_limit: bool
) -> list[str]:
    """Return why the checks do not pass."""
    none = "the recipe sets no limit, so nothing was judged: set one under gate"
    lacking = [] if has_limit else [none]
    if windows < MIN_WINDOWS:
        few = (
            f"too few evaluation windows to judge: {windows}, and at least {MIN_WINDOWS} are needed"
            " (more evaluation data, or a shorter gate.sequence_length)"
        )
        return [few, *lacking]
    return [
        *(explain_check(check, confidence) for check in checks if check.verdict != "PASS"),
        *lacking,
    ]


def _want_windows(result: EvalResult, spec: GateSpec, checks: Sequence[Check]) -> tuple[str, ...]:
    """Say how many windows would decide; nothing where that is said already, or none would."""
    windows = len(result.kl)
    undecided = any(check.verdict == "INCONCLUSIVE" for check in checks)
    if not undecided or windows < MIN_WINDOWS:
        return ()
    needed = estimate_windows(checks, windows)
    available = max(windows, *result.looks, 0)
    return (explain_windows(needed, windows, available=available, limit=spec.most_windows),)


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


def _measure(result: EvalResult, confidence: float) -> tuple[Metric, Metric, Metric]:
    """Return perplexity, KL and top-1 agreement, with their intervals."""
    base = np.array(result.baseline_nll)
    difference = np.array(result.candidate_nll) - base
    columns = np.stack([difference, np.array(result.kl), np.array(result.agreement)], axis=1)
    bounds = mean_intervals(columns, confidence)
    # Windows know nothing of what can be: no divergence is negative, no share above 1.
    bounds[1] = bounds[1].clip(min=0)
    bounds[2] = bounds[2].clip(0, 1)
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
            verdict=compare_limit(name, limit, metric)
            if windows >= MIN_WINDOWS
            else "INCONCLUSIVE",
        )
        for name, limit, value, metric in rows
        if limit is not None
    )


def _increase(difference: float) -> float:
    return math.expm1(min(float(difference), LARGEST_EXPONENT))


def _exp(nll: float) -> float:
    return math.exp(min(nll, LARGEST_EXPONENT))
