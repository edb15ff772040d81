"""What the plan foretold beside what the job took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.records import Report
from quantkit.records.predicting import WITHIN
from quantkit.report.rounding import ABSENT, format_bytes, format_seconds

PREDICTED_TITLES = ("Stage", "Predicted", "Measured")

PREDICTED_LEAD = (
    "Foretold before any work from the plan and a second of measuring this machine. The gate is "
    "foretold as far as its first look; a job that was resumed took the time of what was left."
)


@dataclass(frozen=True)
class PredictedRow:
    """A stage, or all, or the memory: what was foretold and what it took."""

    what: str
    predicted: str
    measured: str


def predicted_rows(report: Report) -> tuple[PredictedRow, ...]:
    """Return a row a stage, one for all of them and one for the memory; none without a prediction.

    Jobs of encoders, and gates alone, have none.
    """
    timings = report.evidence.get("timings")
    predicted = timings.get("predicted") if isinstance(timings, Mapping) else None
    if not isinstance(timings, Mapping) or not isinstance(predicted, Mapping):
        return ()
    foretold, took = _numbers(predicted.get("seconds")), _numbers(timings.get("seconds"))
    stages = [stage for stage, seconds in foretold.items() if seconds > 0]
    rows = [
        PredictedRow(
            f"of it {stage}" if stage in WITHIN else stage,
            format_seconds(foretold[stage]),
            format_seconds(took[stage]) if stage in took else ABSENT,
        )
        for stage in stages
    ]
    counted = [stage for stage in stages if stage not in WITHIN]
    whole = sum(foretold[stage] for stage in counted)
    spent = sum(took.get(stage, 0.0) for stage in counted)
    rows.append(PredictedRow("all", format_seconds(whole), format_seconds(spent)))
    rows.append(
        PredictedRow(
            "peak memory",
            _bytes(predicted.get("peak_memory_bytes")),
            _bytes(timings.get("peak_memory_bytes")),
        )
    )
    return tuple(rows)


def _numbers(value: Any) -> dict[str, float]:
    """Durations by name, whatever else there may be left aside."""
    items = value.items() if isinstance(value, Mapping) else ()
    return {
        str(key): float(number)
        for key, number in items
        if isinstance(number, int | float) and not isinstance(number, bool)
    }


def _bytes(value: Any) -> str:
    return format_bytes(value) if type(value) is int else ABSENT
