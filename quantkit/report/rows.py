"""The headline table and the checks, rounded once for every renderer and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantkit.judging.words import name_check
from quantkit.records import ArtifactReport, Check, Judgement, Metric, Report, Verdict
from quantkit.report.rounding import (
    ABSENT,
    format_bytes,
    format_pair,
    format_ratio,
    format_together,
)


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


def headline_cells(row: HeadlineRow) -> dict[str, str]:
    """Return the cells of a plain table, in order, by the title of their column."""
    increase = row.perplexity_increase
    if row.perplexity_interval:
        increase = f"{increase}; {row.perplexity_interval}"
    return {
        "Artifact": row.name,
        "Format": row.format,
        "Scheme": row.scheme,
        "Size": _with(row.size, row.size_ratio),
        "Bits/weight": row.bits_per_weight,
        "Perplexity": _with(row.perplexity, increase),
        "KL (nats)": _with(row.kl, row.kl_interval),
        "Top-1 agreement": _with(row.top1_agreement, row.top1_interval),
        "Verdict": row.verdict,
    }


def check_rows(judgement: Judgement) -> tuple[CheckRow, ...]:
    """Return one row a check, in the order of the judgement."""
    return tuple(_check_row(check) for check in judgement.checks)


def _with(text: str, more: str) -> str:
    return f"{text} ({more})" if more not in ("", ABSENT) else text


def _headline_row(report: Report, artifact: ArtifactReport) -> HeadlineRow:
    judgement = artifact.judgement
    perplexity, increase, increase_interval = _perplexity(judgement.perplexity)
    kl, kl_interval = _figure(judgement.kl)
    agreement, agreement_interval = _figure(judgement.top1_agreement, percent=True)
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


def _figure(metric: Metric | None, *, percent: bool = False) -> tuple[str, str]:
    if metric is None:
        return ABSENT, ""
    numbers = (metric.value, metric.low, metric.high)
    value, low, high = format_together(numbers, percent=percent)
    return value, f"{low} to {high}"


def _check_row(check: Check) -> CheckRow:
    words, percent = name_check(check.name)
    numbers = (check.limit, check.value, check.low, check.high)
    limit, value, low, high = format_together(numbers, percent=percent)
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
