"""From measurements of an encoder to a verdict (docs/gate.md, "Encoders" and "Verdict")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.judging.checks import combine_checks, compare_limit, explain_check
from quantkit.judging.encoder_metrics import (
    macro_f1,
    resampled_f1,
    resampled_spearman,
    spearman,
)
from quantkit.judging.encoder_statistics import (
    percentile_interval,
    resampled_interval,
    share_interval,
)
from quantkit.judging.percentile import LOWEST_COSINE, PERCENTILE, texts_for_percentile
from quantkit.judging.statistics import mean_intervals
from quantkit.judging.words import COSINE_P1
from quantkit.recipe import GateSpec
from quantkit.records import Check, EncoderResult, Judgement, Measure, Metric

MIN_TEXTS = 8
"""Fewer texts (or pairs) decide nothing: below, an interval says more about chance than about the
model."""

ROUNDING = 1e-5
"""Relative difference that float32 arithmetic in another order explains; rounding one layer to
eight bits gives a hundred times as much."""


@dataclass(frozen=True)
class _Measured:
    """One measure, the check that it may be held to, and how many numbers it rests on."""

    measure: Measure
    check: str
    limit: float | None
    checked: Metric
    """What the limit is about: the measure itself, or its drop."""
    count: int


def judge_encoder(
    result: EncoderResult,
    spec: GateSpec,
    *,
    suspicions: Sequence[str] = (),
    quantized: bool = True,
) -> Judgement:
    """Judge what was measured by those limits of `spec` that fit the encoder's task.

    Each limit that is set gives a check, PASS when the whole confidence interval is within the
    limit, FAIL when it is wholly outside, else INCONCLUSIVE. The artifact fails if a check fails
    or if anything is suspicious; it passes if every check passes, and there is one. A limit whose
    measure has fewer than `MIN_TEXTS` numbers, or could not be taken, does not pass.

    Args:
        result: both models on the same texts.
        spec: limits, confidence and the seed of the bootstrap.
        suspicions: what other checks found; each fails the artifact.
        quantized: whether the artifact's weights were quantized, so that it cannot compute what
            the baseline does.
    """
    doubts = [*_find_doubts(result, quantized=quantized), *result.suspicions, *suspicions]
    measured = _measure(result, spec) if result.finite else []
    checks = tuple(
        _check(each, each.limit, spec.confidence) for each in measured if each.limit is not None
    )
    reasons = [*doubts, *_explain(measured, checks, spec.confidence)]
    lacking = result.finite and _lacks_overlap(result, spec)
    if lacking:
        reasons += [note for note in result.notes if "overlap" in note]
    if not checks and not doubts:
        reasons += result.notes or ["the recipe sets no limit that fits, so nothing was judged"]
    verdict = combine_checks(checks)
    if lacking and verdict == "PASS":
        verdict = "INCONCLUSIVE"
    return Judgement(
        verdict="FAIL" if doubts else verdict,
        checks=checks,
        reasons=tuple(dict.fromkeys(reasons)),
        perplexity=None,
        kl=None,
        top1_agreement=None,
        confidence=spec.confidence,
        windows=result.texts,
        measured_with=result.versions,
        measures=tuple(each.measure for each in measured),
        notes=tuple(note for note in result.notes if note not in reasons),
    )


def _find_doubts(result: EncoderResult, *, quantized: bool) -> list[str]:
    """Return the suspicions that the measurements themselves give."""
    if result.texts == 0:
        return ["nothing was measured: there was no text"]
    if not result.finite:
        # The evaluation says whose numbers they are.
        told = any(sentence.startswith("not finite") for sentence in result.suspicions)
        return [] if told else ["not finite: one of the two models gave a NaN or an infinity"]
    if quantized and result.identical:
        return [
            "every number equals the baseline's: the artifact computes what the baseline does, so "
            "it is a copy of it and not a quantized model"
        ]
    if quantized and result.difference is not None and result.difference < ROUNDING:
        return [
            f"the outputs differ from the baseline's by {result.difference:.2g} of their size, as "
            "rounding in another order does: the weights of the artifact are not quantized"
        ]
    return []


def _lacks_overlap(result: EncoderResult, spec: GateSpec) -> bool:
    is_wanted = result.task == "embedding" and spec.min_retrieval_overlap is not None
    return is_wanted and not result.overlap


def _measure(result: EncoderResult, spec: GateSpec) -> list[_Measured]:
    """Return everything that the result holds numbers of, in the order of the report."""
    found = []
    means = (
        ("cosine", result.cosine, "min_cosine", spec.min_cosine),
        ("retrieval_overlap", result.overlap, "min_retrieval_overlap", spec.min_retrieval_overlap),
        ("label_agreement", result.agreement, "min_label_agreement", spec.min_label_agreement),
    )
    for name, values, check, limit in means:
        if values:
            is_share = result.task == "sequence-classification"
            metric = _share(values, spec) if is_share else _mean(np.array(values), spec)
            found.append(_Measured(Measure(name, metric), check, limit, metric, len(values)))
        if name == "cosine" and values:
            metric = _percentile(np.array(values), spec)
            found.append(
                _Measured(
                    Measure(COSINE_P1, metric),
                    "min_cosine_p1",
                    spec.min_cosine_p1,
                    metric,
                    len(values),
                )
            )
    return found + (_measure_scores(result, spec) if result.labels else [])


def _measure_scores(result: EncoderResult, spec: GateSpec) -> list[_Measured]:
    """Accuracy and F1 against labels, or the rank correlation with similarities."""
    labels = np.array(result.labels)
    scores = np.array(result.baseline_score), np.array(result.candidate_score)
    if not result.baseline_labels:
        return [_compare_statistic("spearman", spearman, resampled_spearman, labels, scores, spec)]
    first, second = (float(values.mean()) for values in scores)
    low, high = mean_intervals((scores[0] - scores[1])[:, None], spec.confidence)[0]
    predicted = np.array(result.baseline_labels), np.array(result.candidate_labels)
    classes = labels.astype(int)
    return [
        _drop("accuracy", (first, second), (float(low), float(high)), len(labels), spec),
        _compare_statistic("f1", macro_f1, resampled_f1, classes, predicted, spec),
    ]


def _compare_statistic(
    name: str,
    statistic: Callable[[np.ndarray, np.ndarray], float],
    resampled: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    labels: np.ndarray,
    both: tuple[np.ndarray, np.ndarray],
    spec: GateSpec,
) -> _Measured:
    """Take a statistic of both models on the same draws of rows."""
    first, second = (statistic(labels, values) for values in both)

    def difference(counts: np.ndarray) -> np.ndarray:
        return resampled(labels, both[0], counts) - resampled(labels, both[1], counts)

    bounds = resampled_interval(difference, len(labels), spec.confidence, spec.seed)
    return _drop(name, (first, second), bounds, len(labels), spec)


def _drop(
    name: str,
    values: tuple[float, float],
    bounds: tuple[float, float],
    count: int,
    spec: GateSpec,
) -> _Measured:
    """A measure with a baseline, judged by what it lost; `bounds` are those of the loss."""
    baseline, value = values
    low, high = bounds
    measure = Measure(name, Metric(value, baseline - high, baseline - low, baseline=baseline))
    lost = Metric(baseline - value, low, high)
    return _Measured(measure, f"max_{name}_drop", spec.max_metric_drop, lost, count)


def _mean(values: np.ndarray, spec: GateSpec) -> Metric:
    low, high = mean_intervals(values[:, None], spec.confidence)[0]
    return Metric(float(values.mean()), float(low), float(high))


def _share(values: Sequence[float], spec: GateSpec) -> Metric:
    hits = sum(value == 1 for value in values)
    return Metric(hits / len(values), *share_interval(hits, len(values), spec.confidence))


def _percentile(values: np.ndarray, spec: GateSpec) -> Metric:
    low, high = percentile_interval(values, spec.confidence)
    return Metric(float(np.quantile(values, PERCENTILE)), low, high)


def _check(each: _Measured, limit: float, confidence: float) -> Check:
    metric = each.checked
    enough = each.count >= MIN_TEXTS
    verdict = compare_limit(each.check, limit, metric) if enough else "INCONCLUSIVE"
    return Check(each.check, limit, metric.value, metric.low, metric.high, verdict)


def _explain(
    measured: Sequence[_Measured], checks: Sequence[Check], confidence: float
) -> list[str]:
    """Return a sentence on each check that did not pass, and one on too few texts."""
    counts = {each.check: each.count for each in measured}
    reasons = []
    fewest = min((counts[check.name] for check in checks), default=MIN_TEXTS)
    for check in checks:
        if check.verdict == "PASS" or counts[check.name] < MIN_TEXTS:
            continue
        sentence = explain_check(check, confidence)
        if check.name == "min_cosine_p1" and check.low == LOWEST_COSINE:
            sentence += (
                f"; a 1st percentile is bounded from below by {texts_for_percentile(confidence)} "
                f"texts or more, and there are {counts[check.name]} (gate.samples)"
            )
        reasons.append(sentence)
    if fewest < MIN_TEXTS:
        reasons.append(
            f"too few evaluation texts to judge: {fewest}, and at least {MIN_TEXTS} are needed"
            " (more evaluation data)"
        )
    return reasons
