"""Which artifact of a comparison to take, and why, in one or two sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from quantkit.records import ArtifactReport, Report, Verdict
from quantkit.report.closeness import DISTANCE_WORDS, KL, common_distance, find_distance
from quantkit.report.footprints import find_closer, find_difference
from quantkit.report.rounding import format_bytes, format_significant


def comparison_sentence(report: Report) -> str:
    """Say how many artifacts passed, and which of them is the smallest and which the closest.

    Where the divergences of these two were compared window by window and are not told apart, that
    is said: the smaller one then costs nothing that was measured.
    """
    passed = [each for each in report.artifacts if each.judgement.verdict == "PASS"]
    if not passed:
        return _none_passed(report)
    verb = "holds" if len(passed) == 1 else "hold"
    holds = f"{len(passed)} of {len(report.artifacts)} artifacts {verb} every limit"
    smallest = min(passed, key=lambda each: each.size_bytes)
    return f"{holds}: {_advise(report, passed, smallest)}{_undecided(report, smallest)}"


def _advise(report: Report, passed: Sequence[ArtifactReport], smallest: ArtifactReport) -> str:
    kind = common_distance(passed)
    closest = _closest(passed, kind)
    about = _about(smallest, kind)
    if len(passed) == 1:
        return f"take {smallest.name} ({about})."
    if kind is None or closest is None:
        return f"{smallest.name} is the smallest ({about}); which is the closest is not known."
    if smallest is closest:
        return f"take {smallest.name}, the smallest and the closest to the baseline ({about})."
    return _trade(report, smallest, closest, kind)


def _about(artifact: ArtifactReport, kind: str | None) -> str:
    """Size and, where it is known, distance: `4.11 MB, KL 0.0123`."""
    metric = find_distance(artifact, kind) if kind else None
    size = format_bytes(artifact.size_bytes)
    if kind is None or metric is None:
        return size
    return f"{size}, {DISTANCE_WORDS[kind][0]} {format_significant(metric.value)}"


def _undecided(report: Report, smallest: ArtifactReport) -> str:
    """Name what may turn out to be the better choice."""
    names = [
        each.name
        for each in report.artifacts
        if each.judgement.verdict == "INCONCLUSIVE" and each.size_bytes < smallest.size_bytes
    ]
    return f" Smaller and undecided: {', '.join(names)}." if names else ""


def _trade(report: Report, smallest: ArtifactReport, closest: ArtifactReport, kind: str) -> str:
    """Set the smallest against the closest."""
    ratio = format_significant(closest.size_bytes / smallest.size_bytes)
    sentence = (
        f"{smallest.name} is the smallest ({_about(smallest, kind)}), {closest.name} the closest "
        f"to the baseline ({_about(closest, kind)}; {ratio}× the size)."
    )
    found = find_difference(report.differences, smallest.name, closest.name) if kind == KL else None
    if found is None:
        return sentence
    if found.significant and find_closer(found) == closest.name:
        return sentence + _as_close(report, smallest, closest)
    if found.significant:
        # Each was judged on windows of its own; these are those that both have.
        return (
            f"{sentence} On the windows that both were measured on, {smallest.name} is the closer "
            f"one: take it."
        )
    return f"{sentence} Their difference is not significant: take {smallest.name}."


def _as_close(report: Report, smallest: ArtifactReport, closest: ArtifactReport) -> str:
    """Name the smallest artifact between the two that is not told apart from the closest."""
    between = [
        each
        for each in report.artifacts
        if each.judgement.verdict == "PASS"
        and smallest.size_bytes < each.size_bytes < closest.size_bytes
        and (found := find_difference(report.differences, each.name, closest.name)) is not None
        and not found.significant
    ]
    if not between:
        return ""
    alike = min(between, key=lambda each: each.size_bytes)
    return f" {alike.name} ({format_bytes(alike.size_bytes)}) is not told apart from the closest."


def _none_passed(report: Report) -> str:
    counts = Counter(each.judgement.verdict for each in report.artifacts)
    words: dict[Verdict, str] = {
        "FAIL": "failed",
        "INCONCLUSIVE": "undecided",
        "UNJUDGED": "not measured",
    }
    found = [f"{counts[verdict]} {word}" for verdict, word in words.items() if counts[verdict]]
    if len(report.artifacts) == 1:
        return f"The only artifact did not pass ({found[0][2:]})."
    none = f"None of {len(report.artifacts)} artifacts passed ({', '.join(found)})"
    kind = common_distance(report.artifacts)
    closest = _closest(report.artifacts, kind)
    if kind is None or closest is None:
        return f"{none}."
    return f"{none}; the closest is {closest.name} ({_about(closest, kind)})."


def _closest(artifacts: Sequence[ArtifactReport], kind: str | None) -> ArtifactReport | None:
    """The artifact with the smallest distance; None unless all of those that passed have one."""
    if kind is None:
        return None
    measured = [each for each in artifacts if find_distance(each, kind) is not None]
    if len(measured) < sum(each.judgement.verdict == "PASS" for each in artifacts):
        return None
    return min(measured, key=lambda each: _distance(each, kind), default=None)


def _distance(artifact: ArtifactReport, kind: str) -> float:
    metric = find_distance(artifact, kind)
    return float("inf") if metric is None else metric.value
