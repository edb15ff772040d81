"""The outcomes of a sweep as rows for people, and as plain data for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from quantkit.records import ArtifactReport, Metric
from quantkit.report.rounding import (
    ABSENT,
    format_bytes,
    format_percent,
    format_seconds,
    format_significant,
)
from quantkit.sweeping.records import JobOutcome, SweepResult

SCHEMA = 1

TITLES = ("Job", "Verdict", "Size", "Bits/weight", "KL (nats)", "Perplexity", "Time", "Memory")


@dataclass(frozen=True)
class SweepRow:
    """One line of the table for people: an artifact, or a job that has none."""

    outcome: JobOutcome
    cells: tuple[str, ...]
    """Under `TITLES`."""
    verdict: str
    """That of the artifact, or what became of the job in a word."""


def name_artifacts(outcome: JobOutcome) -> Iterator[tuple[str, ArtifactReport]]:
    """Yield the artifacts of a job by the names that tell them apart in a sweep."""
    several = len(outcome.artifacts) > 1
    for artifact in outcome.artifacts:
        name = f"{outcome.job.name}/{artifact.name}" if several else outcome.job.name
        path = (outcome.job.output / artifact.path).as_posix()
        yield name, replace(artifact, name=name, path=path)


def sweep_rows(result: SweepResult) -> tuple[SweepRow, ...]:
    """Return the lines of the table, in its order."""
    return tuple(row for outcome in result.outcomes for row in _rows(outcome))


def _rows(outcome: JobOutcome) -> Iterator[SweepRow]:
    memory = outcome.peak_memory_bytes
    spent = (
        ABSENT if outcome.seconds is None else format_seconds(outcome.seconds),
        ABSENT if memory is None else format_bytes(memory),
    )
    if not outcome.artifacts:
        state = "not run" if outcome.state == "waiting" else "ERROR"
        dashes = (ABSENT,) * 4
        yield SweepRow(outcome, (outcome.job.name, state, *dashes, *spent), state)
    for name, artifact in name_artifacts(outcome):
        judged = artifact.judgement
        cells = (
            name,
            judged.verdict,
            format_bytes(artifact.size_bytes),
            format_significant(artifact.bits_per_weight),
            format_significant(None if judged.kl is None else judged.kl.value),
            _percent(judged.perplexity),
        )
        yield SweepRow(outcome, (*cells, *spent), judged.verdict)


def _percent(perplexity: Metric | None) -> str:
    """The increase with its sign."""
    increase = None if perplexity is None else perplexity.increase
    sign = "+" if increase is not None and math.isfinite(increase) and increase >= 0 else ""
    return f"{sign}{format_percent(increase)}"


def sweep_document(result: SweepResult) -> dict[str, Any]:
    """Return sweep.json's data: unrounded, null for what was not measured or is not finite."""
    return {
        "schema": SCHEMA,
        "exit_code": result.exit_code,
        "output_root": str(result.output_root),
        "choices": dict(result.choices),
        "reports": {model: str(path) for model, path in result.reports.items()},
        "jobs": [_document(outcome) for outcome in result.outcomes],
    }


def _document(outcome: JobOutcome) -> dict[str, Any]:
    job = outcome.job
    return {
        "name": job.name,
        "recipe": job.recipe,
        "model": job.model,
        "state": outcome.state,
        "resumed": outcome.resumed,
        "exit_code": outcome.exit_code,
        "verdict": outcome.verdict,
        "error": outcome.error,
        "seconds": outcome.seconds,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "output": str(job.output),
        "log": str(job.log),
        "report": None if outcome.report is None else str(outcome.report),
        "artifacts": [_artifact(name, each) for name, each in name_artifacts(outcome)],
    }


def _artifact(name: str, artifact: ArtifactReport) -> dict[str, Any]:
    judged = artifact.judgement
    increase = None if judged.perplexity is None else judged.perplexity.increase
    return {
        "name": name,
        "path": artifact.path,
        "format": artifact.format,
        "scheme": artifact.scheme,
        "size_bytes": artifact.size_bytes,
        "bits_per_weight": artifact.bits_per_weight,
        "kl": None if judged.kl is None else _finite(judged.kl.value),
        "perplexity_increase": _finite(increase),
        "top1_agreement": judged.top1_agreement and _finite(judged.top1_agreement.value),
        "verdict": judged.verdict,
        "reasons": list(judged.reasons),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
