"""What running each artifact takes, and which of them are told apart, rounded for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantkit.records import ArtifactReport, Difference, Footprint, Report
from quantkit.report.rounding import (
    ABSENT,
    format_bytes,
    format_count,
    format_divergences,
    format_seconds,
    format_significant,
)

BASELINE = "baseline"
"""What the original is called beside the artifacts."""

_MOST_ORDERED = 8
"""A longer chain is no sentence any more."""


@dataclass(frozen=True)
class FootprintRow:
    """One artifact in its runtime."""

    artifact: str
    load: str
    memory: str
    prefill: str
    decoding: str
    where: str
    """Runtime and threads."""
    what: str
    """What was timed, and in what the weights were."""


@dataclass(frozen=True)
class DifferenceRow:
    """Two artifacts, the closer one first where they are told apart."""

    closer: str
    further: str
    difference: str
    """How much more divergence the second has."""
    interval: str
    windows: int
    significant: bool


def footprint_rows(report: Report) -> tuple[FootprintRow, ...]:
    """Return one row for the baseline and each artifact whose footprint was taken."""
    found = [(artifact.name, artifact.judgement.footprint) for artifact in report.artifacts]
    found.insert(0, (BASELINE, report.baseline_footprint))
    return tuple(_footprint_row(name, each) for name, each in found if each is not None)


def footprint_notes(rows: Sequence[FootprintRow]) -> tuple[str, ...]:
    """Say what was timed: once where it is the same for all rows."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.what:
            names.setdefault(row.what, []).append(row.artifact)
    if len(names) == 1 and sum(map(len, names.values())) == len(rows):
        return tuple(f"{what[:1].upper()}{what[1:]}." for what in names)
    return tuple(f"{', '.join(found)}: {what}." for what, found in names.items())


def footprint_sentence(row: FootprintRow) -> str:
    """Return a footprint as one line, without what was timed."""
    found = (
        ("loads in", row.load),
        ("takes", row.memory),
        ("reads", row.prefill),
        ("writes", row.decoding),
    )
    words = ", ".join(f"{verb} {value}" for verb, value in found if value != ABSENT)
    return f"{words}; {row.where}"


def difference_rows(report: Report) -> tuple[DifferenceRow, ...]:
    """Return one row a pair, in the order of the report."""
    return tuple(map(_difference_row, report.differences))


def order_sentence(report: Report) -> str:
    """Say in which order the artifacts lie behind the baseline, and what is not told apart.

    Empty where a neighbour in that order has no difference that was taken, or one that contradicts
    it (artifacts may be judged after different numbers of windows, and are compared on those that
    both have); and where there are more artifacts than a sentence holds.
    """
    measured = [each for each in report.artifacts if each.judgement.kl is not None]
    if not 2 <= len(measured) <= _MOST_ORDERED:
        return ""
    measured.sort(key=_kl)
    groups: list[list[str]] = [[measured[0].name]]
    for before, after in pairwise(measured):
        found = find_difference(report.differences, before.name, after.name)
        if found is None or (found.significant and find_closer(found) != before.name):
            return ""
        if found.significant:
            groups.append([after.name])
        else:
            groups[-1].append(after.name)
    if len(groups) == 1:
        return "No neighbours in the order of KL can be told apart."
    return f"From the closest to the furthest: {', then '.join(map(_join, groups))}."


def find_difference(differences: Sequence[Difference], one: str, other: str) -> Difference | None:
    """Return the difference between two artifacts, whichever of them is the first in it."""
    for difference in differences:
        if {difference.first, difference.second} == {one, other}:
            return difference
    return None


def find_closer(difference: Difference) -> str:
    """Return which of the two has the smaller divergence on the windows that both have."""
    return difference.second if difference.kl.value > 0 else difference.first


def _join(group: Sequence[str]) -> str:
    """Name artifacts of which each is not told apart from the next."""
    if len(group) == 1:
        return group[0]
    apart = "not told apart" if len(group) == 2 else "neighbours not told apart"
    return f"{', '.join(group[:-1])} and {group[-1]} ({apart})"


def _kl(artifact: ArtifactReport) -> float:
    kl = artifact.judgement.kl
    return math.inf if kl is None or math.isnan(kl.value) else kl.value


def _footprint_row(name: str, footprint: Footprint) -> FootprintRow:
    memory = footprint.memory_bytes
    return FootprintRow(
        artifact=name,
        load=format_seconds(footprint.load_seconds),
        memory=ABSENT if memory is None else format_bytes(memory),
        prefill=_rate(footprint.prefill),
        decoding=_rate(footprint.decoding),
        where=f"{footprint.runtime}, {format_count(footprint.threads, 'thread')}",
        what=footprint.what,
    )


def _rate(tokens: float | None) -> str:
    return ABSENT if tokens is None else f"{format_significant(tokens)} tokens/s"


def _difference_row(difference: Difference) -> DifferenceRow:
    metric = difference.kl
    closer, numbers = find_closer(difference), (metric.value, metric.low, metric.high)
    if closer == difference.first:
        numbers = (-metric.value, -metric.high, -metric.low)
    value, low, high = format_divergences(*numbers)
    return DifferenceRow(
        closer=closer,
        further=difference.second if closer == difference.first else difference.first,
        difference=value,
        interval=f"{low} to {high}",
        windows=difference.windows,
        significant=difference.significant,
    )
