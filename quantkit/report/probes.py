"""How an artifact behaves beside its baseline, and how it does in tasks, rounded for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.records import ArtifactReport, Probe, TaskResult, Verdict
from quantkit.report.rounding import (
    ABSENT,
    count_digits,
    format_pair,
    format_percent,
    format_significant,
    format_together,
)


def _nats(value: float, digits: int = 3) -> str:
    return f"{format_significant(value, digits)} nats"


def _times(value: float, digits: int = 3) -> str:
    return f"{format_significant(value, digits)}×"


_PROBES: Mapping[str, tuple[str, Callable[[float, int], str]]] = MappingProxyType(
    {
        "new_loops": ("New loops", format_percent),
        "changed_endings": ("Changed endings", format_percent),
        "lost_json": ("Lost JSON answers", format_percent),
        "special_tokens": ("Special tokens", _nats),
        "long_context": ("Long context", _times),
    }
)
"""Name of a probe -> (title, how its value is written)."""


@dataclass(frozen=True)
class ProbeRow:
    """One probe in words. `probe` has the same unrounded."""

    label: str
    value: str
    limit: str
    """With its direction; a dash without one."""
    verdict: Verdict
    detail: str
    probe: Probe

    @property
    def is_judged(self) -> bool:
        """Whether there is a limit, so that the verdict says something."""
        return self.probe.limit is not None

    @property
    def has_value(self) -> bool:
        """Whether it could be looked at."""
        return self.probe.value is not None


@dataclass(frozen=True)
class TaskRow:
    """One task in words. `task` has the same unrounded."""

    name: str
    metric: str
    samples: str
    scores: str
    """Baseline's, then the artifact's: `0.412 → 0.408`."""
    recovery: str
    interval: str
    """Of the recovery."""
    limit: str
    p_value: str
    """Of McNemar's test; a dash where documents are not right or wrong."""
    lost_won: str
    """Documents that the artifact lost, and that it won: `12 / 9`."""
    verdict: Verdict
    task: TaskResult

    @property
    def is_judged(self) -> bool:
        """Whether there is a limit, so that the verdict says something."""
        return self.task.limit is not None


def probe_rows(artifact: ArtifactReport) -> tuple[ProbeRow, ...]:
    """Return one row a probe, in the order of the judgement."""
    return tuple(_probe_row(probe) for probe in artifact.judgement.probes)


def task_rows(artifact: ArtifactReport) -> tuple[TaskRow, ...]:
    """Return one row a task, in the order of the judgement."""
    return tuple(_task_row(task) for task in artifact.judgement.tasks)


def unsettled_probes(artifact: ArtifactReport) -> tuple[ProbeRow, ...]:
    """Return the probes that want a look: failed, or with a limit and not looked at."""
    return tuple(row for row in probe_rows(artifact) if row.is_judged and row.verdict != "PASS")


def probe_sentence(row: ProbeRow) -> str:
    """Return a probe as one line: `New loops 30.0%, at most 25.0%: 9 of 30 prompts`."""
    limit = f", {row.limit}" if row.is_judged else ""
    detail = f": {row.detail}" if row.detail else ""
    value = f"{row.value}{limit}" if row.has_value else "not looked at"
    return f"{row.label} {value}{detail}"


def task_sentence(row: TaskRow) -> str:
    """Return a task as one line, its verdict left out."""
    limit = f", {row.limit}" if row.is_judged else ""
    return (
        f"{row.name} {row.metric} {row.scores} on {row.samples} documents: "
        f"recovers {row.recovery} ({row.interval}){limit}"
    )


def count_judged(rows: Iterable[ProbeRow | TaskRow]) -> int:
    """Return how many have a limit."""
    return sum(row.is_judged for row in rows)


def _probe_row(probe: Probe) -> ProbeRow:
    plain = probe.name.replace("_", " ").capitalize()
    label, write = _PROBES.get(probe.name, (plain, format_significant))
    digits = 3
    if probe.value is not None and probe.limit is not None:
        digits = count_digits(probe.value, probe.limit)
    return ProbeRow(
        label=label,
        value=ABSENT if probe.value is None else write(probe.value, digits),
        limit=ABSENT if probe.limit is None else f"at most {write(probe.limit, digits)}",
        verdict=probe.verdict,
        detail=probe.detail,
        probe=probe,
    )


def _task_row(task: TaskResult) -> TaskRow:
    before, after = format_pair(task.baseline, task.artifact)
    limits = () if task.limit is None else (task.limit,)
    numbers = (task.recovery, task.low, task.high, *limits)
    recovery, low, high, *limit = format_together(numbers, percent=True)
    return TaskRow(
        name=task.name,
        metric=task.metric,
        samples=f"{task.samples:,}",
        scores=f"{before} → {after}",
        recovery=recovery,
        interval=f"{low} to {high}",
        limit=f"at least {limit[0]}" if limit else ABSENT,
        p_value=_chance(task.p_value),
        lost_won=f"{task.lost} / {task.won}",
        verdict=task.verdict,
        task=task,
    )


def _chance(p_value: float | None) -> str:
    if p_value is None or not math.isfinite(p_value):
        return ABSENT
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
