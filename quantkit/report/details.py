"""What the windows show besides the metrics with limits, rounded for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.records import PositionRange, Report
from quantkit.report.rounding import (
    ABSENT,
    format_percent,
    format_significant,
    format_together,
)
from quantkit.report.rows import divergence_figure, metric_figure


@dataclass(frozen=True)
class MetricRow:
    """The further metrics of one artifact; those with an interval as (value, interval)."""

    artifact: str
    kl_p99: str
    kl_max: str
    reverse_kl: tuple[str, str]
    top5_agreement: tuple[str, str]
    flips: tuple[str, str]
    lost_won: str
    """The two parts of the flips: `3.10% / 2.42%`."""


@dataclass(frozen=True)
class DomainRow:
    """One kind of text, as one artifact has it. The last three are unrounded, to sort by."""

    artifact: str
    name: str
    windows: int
    tokens: int
    kl: str
    interval: str
    perplexity_increase: str
    top1_agreement: str
    numbers: tuple[float, float, float]


@dataclass(frozen=True)
class RangeRow:
    """One range of positions, as one artifact has it."""

    artifact: str
    label: str
    kl: str
    interval: str
    top1_agreement: str


def metric_rows(report: Report) -> tuple[MetricRow, ...]:
    """Return one row for each artifact that has details."""
    rows = []
    for artifact in report.artifacts:
        details, kl = artifact.judgement.details, artifact.judgement.kl
        if details is None:
            continue
        won = max(0.0, details.flips.value - details.lost)
        rows.append(
            MetricRow(
                artifact=artifact.name,
                kl_p99=ABSENT if kl is None else format_significant(kl.p99),
                kl_max=ABSENT if kl is None else format_significant(kl.maximum),
                reverse_kl=divergence_figure(details.reverse_kl),
                top5_agreement=metric_figure(details.top5_agreement, percent=True),
                flips=metric_figure(details.flips, percent=True),
                lost_won=" / ".join(format_together((details.lost, won), percent=True)),
            )
        )
    return tuple(rows)


def domain_rows(report: Report) -> tuple[DomainRow, ...]:
    """Return one row for each kind of text and artifact; those of one kind side by side."""
    found = [
        (artifact.name, domain)
        for artifact in report.artifacts
        if artifact.judgement.details is not None
        for domain in artifact.judgement.details.domains
    ]
    order = list(dict.fromkeys(domain.name for _, domain in found))
    found.sort(key=lambda pair: order.index(pair[1].name))
    rows = []
    for name, domain in found:
        kl, interval = divergence_figure(domain.kl)
        (increase,) = format_together((domain.perplexity_increase,), percent=True, sign=True)
        rows.append(
            DomainRow(
                artifact=name,
                name=domain.name,
                windows=domain.windows,
                tokens=domain.tokens,
                kl=kl,
                interval=interval,
                perplexity_increase=increase,
                top1_agreement=format_percent(domain.top1_agreement),
                numbers=(domain.kl.value, domain.perplexity_increase, domain.top1_agreement),
            )
        )
    return tuple(rows)


def range_rows(report: Report) -> tuple[RangeRow, ...]:
    """Return one row for each artifact and range of positions."""
    return tuple(
        RangeRow(artifact.name, range_label(each), *divergence_figure(each.kl), _agreement(each))
        for artifact in report.artifacts
        if artifact.judgement.details is not None
        for each in artifact.judgement.details.positions
    )


def range_label(positions: PositionRange) -> str:
    """Return how many tokens had been read there: `17–64`."""
    first, last = positions.start + 1, positions.stop
    return f"{first:,}" if first >= last else f"{first:,}–{last:,}"


def several(rows: Sequence[MetricRow | DomainRow | RangeRow]) -> bool:
    """Whether the rows are of more than one artifact."""
    return len({row.artifact for row in rows}) > 1


def _agreement(positions: PositionRange) -> str:
    return format_percent(positions.top1_agreement.value)
