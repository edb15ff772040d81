"""The headline table and the checks, rounded once for every renderer and the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.judging.percentile import LOWEST_COSINE
from quantkit.judging.places import find_baseline_runtime
from quantkit.judging.words import COSINE_P1, name_check, name_measure
from quantkit.records import (
    ArtifactReport,
    Check,
    Judgement,
    Measure,
    Metric,
    Report,
    Speed,
    Verdict,
)
from quantkit.report.rounding import (
    ABSENT,
    format_bytes,
    format_count,
    format_divergences,
    format_pair,
    format_ratio,
    format_significant,
    format_together,
)


@dataclass(frozen=True)
class Figure:
    """One figure for people: a column of the headline table and what stands in it."""

    title: str
    value: str
    below: tuple[str, ...] = ()
    """What belongs to it: a ratio, an interval. Empty texts are not shown."""


@dataclass(frozen=True)
class HeadlineRow:
    """One artifact in figures for people. An interval is empty where nothing was measured."""

    name: str
    format: str
    scheme: str
    size: str
    size_ratio: str
    bits_per_weight: str
    perplexity: str
    """Baseline's, then the artifact's: `12.41 → 12.63`."""
    perplexity_increase: str
    perplexity_interval: str
    """Of the increase."""
    kl: str
    kl_interval: str
    top1_agreement: str
    top1_interval: str
    verdict: Verdict
    is_encoder: bool
    """An encoder has no perplexity, KL or top-1 agreement; it has measures."""
    measures: tuple[Figure, ...]
    speed: tuple[Figure, ...]


@dataclass(frozen=True)
class SpeedRow:
    """One timing: what was timed, both speeds, and on what."""

    artifact: str
    what: str
    figure: str
    """Baseline's, then the artifact's: `310 → 905 tokens/s`."""
    ratio: str
    where: str


@dataclass(frozen=True)
class CheckRow:
    """One check in words. `check` has the same unrounded."""

    label: str
    limit: str
    """With its direction: `at most 3.00%`."""
    value: str
    interval: str
    verdict: Verdict
    is_upper: bool
    """Whether the limit is the largest value allowed rather than the smallest."""
    check: Check


def headline_rows(report: Report) -> tuple[HeadlineRow, ...]:
    """Return one row of the headline table for each artifact."""
    return tuple(_headline_row(report, artifact) for artifact in report.artifacts)


def headline_figures(rows: Sequence[HeadlineRow]) -> tuple[tuple[Figure, ...], ...]:
    """Return the figures of each row; all rows have the same titles in the same order.

    The columns of decoders are left out where all rows are encoders; what only some artifacts have
    is a dash for the others.
    """
    found = [_figures(row, decoders=not all(each.is_encoder for each in rows)) for row in rows]
    titles = list(dict.fromkeys(figure.title for figures in found for figure in figures))
    by_title = [{figure.title: figure for figure in figures} for figures in found]
    return tuple(
        tuple(figures.get(title, Figure(title, ABSENT)) for title in titles) for figures in by_title
    )


def headline_cells(rows: Sequence[HeadlineRow]) -> list[dict[str, str]]:
    """Return of each row the cells of a plain table, in order, by the title of their column."""
    return [
        {
            "Artifact": row.name,
            "Format": row.format,
            "Scheme": row.scheme,
            **{figure.title: _in_one_line(figure) for figure in figures},
            "Verdict": row.verdict,
        }
        for row, figures in zip(rows, headline_figures(rows), strict=True)
    ]


def speed_rows(report: Report) -> tuple[SpeedRow, ...]:
    """Return one row for each timing of each artifact."""
    return tuple(
        _speed_row(artifact.name, speed)
        for artifact in report.artifacts
        for speed in artifact.judgement.speed
    )


def is_encoder(artifact: ArtifactReport) -> bool:
    """Whether the artifact's model turns texts into vectors or labels."""
    return artifact.task is not None or bool(artifact.judgement.measures)


def name_samples(artifact: ArtifactReport) -> str:
    """Return what `Judgement.windows` counts."""
    return "texts" if is_encoder(artifact) else "windows of text"


def describe_samples(artifact: ArtifactReport) -> str:
    """Return what both models read, and where: `128 windows of text in vllm`."""
    found = f"{artifact.judgement.windows} {name_samples(artifact)}"
    runtime, other = artifact.runtime, find_baseline_runtime(artifact.runtime)
    if runtime == other:
        return f"{found} in {runtime}"
    return f"{found}, the artifact in {runtime} and the baseline in {other}"


def check_rows(judgement: Judgement) -> tuple[CheckRow, ...]:
    """Return one row a check, in the order of the judgement."""
    return tuple(_check_row(check) for check in judgement.checks)


def metric_figure(metric: Metric | None, *, percent: bool = False) -> tuple[str, str]:
    """Return a value and its interval; a dash and nothing for what was not measured."""
    if metric is None:
        return ABSENT, ""
    numbers = (metric.value, metric.low, metric.high)
    value, low, high = format_together(numbers, percent=percent)
    return value, f"{low} to {high}"


def divergence_figure(metric: Metric | None) -> tuple[str, str]:
    """As `metric_figure`, of a divergence in nats."""
    if metric is None:
        return ABSENT, ""
    value, low, high = format_divergences(metric.value, metric.low, metric.high)
    return value, f"{low} to {high}"


def _figures(row: HeadlineRow, *, decoders: bool) -> tuple[Figure, ...]:
    perplexity = (row.perplexity_increase, row.perplexity_interval)
    return (
        Figure("Size", row.size, (row.size_ratio,)),
        Figure("Bits/weight", row.bits_per_weight),
        *(
            (
                Figure("Perplexity", row.perplexity, perplexity),
                Figure("KL (nats)", row.kl, (row.kl_interval,)),
                Figure("Top-1 agreement", row.top1_agreement, (row.top1_interval,)),
            )
            if decoders
            else ()
        ),
        *row.measures,
        *row.speed,
    )


def _in_one_line(figure: Figure) -> str:
    more = "; ".join(text for text in figure.below if text not in ("", ABSENT))
    return f"{figure.value} ({more})" if more else figure.value


def _headline_row(report: Report, artifact: ArtifactReport) -> HeadlineRow:
    judgement = artifact.judgement
    perplexity, increase, increase_interval = _perplexity(judgement.perplexity)
    kl, kl_interval = divergence_figure(judgement.kl)
    agreement, agreement_interval = metric_figure(judgement.top1_agreement, percent=True)
    bits = artifact.bits_per_weight
    return HeadlineRow(
        name=artifact.name,
        format=artifact.format,
        scheme=artifact.scheme,
        size=format_bytes(artifact.size_bytes),
        size_ratio=format_ratio(artifact.size_bytes, report.baseline_bytes),
        bits_per_weight=f"{bits:.2f}" if math.isfinite(bits) else ABSENT,
        perplexity=perplexity,
        perplexity_increase=increase,
        perplexity_interval=increase_interval,
        kl=kl,
        kl_interval=kl_interval,
        top1_agreement=agreement,
        top1_interval=agreement_interval,
        verdict=judgement.verdict,
        is_encoder=is_encoder(artifact),
        measures=tuple(map(_measure, judgement.measures)),
        speed=_speeds(judgement.speed),
    )


def _measure(measure: Measure) -> Figure:
    title, percent = name_measure(measure.name)
    metric = measure.metric
    if metric.baseline is None:
        unbounded = measure.name == COSINE_P1 and metric.low == LOWEST_COSINE
        value, interval = (
            _percentile(metric) if unbounded else metric_figure(metric, percent=percent)
        )
        return Figure(title, value, (interval,))
    numbers = (metric.baseline, metric.value, metric.low, metric.high)
    before, after, low, high = format_together(numbers, percent=percent)
    return Figure(title, f"{before} → {after}", (f"{low} to {high}",))


def _speeds(speeds: Sequence[Speed]) -> tuple[Figure, ...]:
    """One figure; of several timings one each, told apart by the first word of what was timed."""
    rows = [_speed_row("", speed) for speed in speeds]
    firsts = [row.what.partition(" ")[0] for row in rows]
    several = len(rows) > 1
    names = firsts if len(set(firsts)) == len(rows) else [row.what for row in rows]
    return tuple(
        Figure(f"Speed, {name}" if several else "Speed", row.figure, (row.ratio,))
        for name, row in zip(names, rows, strict=True)
    )


def _speed_row(name: str, speed: Speed) -> SpeedRow:
    before, after = (format_significant(value) for value in (speed.baseline, speed.artifact))
    known = speed.baseline > 0 and math.isfinite(speed.artifact / speed.baseline)
    times = f", median of {speed.repetitions}" if speed.repetitions > 1 else ""
    return SpeedRow(
        artifact=name,
        what=speed.what,
        figure=f"{before} → {after} {speed.unit}/s",
        ratio=f"{format_significant(speed.artifact / speed.baseline)}×" if known else ABSENT,
        where=f"{speed.runtime}, {format_count(speed.threads, 'thread')}{times}",
    )


def _perplexity(metric: Metric | None) -> tuple[str, str, str]:
    if metric is None:
        return ABSENT, ABSENT, ""
    baseline = math.nan if metric.baseline is None else metric.baseline
    before, after = format_pair(baseline, metric.value)
    if metric.increase is None:
        return f"{before} → {after}", ABSENT, ""
    increase, low, high = format_together(
        (metric.increase, metric.low, metric.high), percent=True, sign=True
    )
    return f"{before} → {after}", increase, f"{low} to {high}"


def _percentile(metric: Metric) -> tuple[str, str]:
    """A percentile of few texts, which no value bounds from below."""
    value, high = format_together((metric.value, metric.high))
    return value, f"at most {high}"


def _check_row(check: Check) -> CheckRow:
    words, percent = name_check(check.name)
    numbers = (check.limit, check.value, check.low, check.high)
    limit, value, low, high = (
        format_divergences(*numbers)
        if check.name == "max_kl"
        else format_together(numbers, percent=percent)
    )
    is_upper = not (check.name.startswith("min_") or "agreement" in check.name)
    return CheckRow(
        label=words[:1].upper() + words[1:],
        limit=f"at {'most' if is_upper else 'least'} {limit}",
        value=value,
        interval=f"{low} to {high}",
        verdict=check.verdict,
        is_upper=is_upper,
        check=check,
    )
