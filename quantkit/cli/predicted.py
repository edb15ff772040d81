"""What a job is expected to take, as `quantkit plan` says it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from quantkit.records import Prediction
from quantkit.records.predicting import WITHIN
from quantkit.report.rounding import format_bytes, format_seconds


def prediction_document(prediction: Prediction | None) -> dict[str, Any] | None:
    """Return a prediction as JSON; None without one."""
    if prediction is None:
        return None
    return {**asdict(prediction), "total_seconds": prediction.total_seconds}


def prediction_rows(prediction: Prediction) -> Iterator[tuple[str, str]]:
    """Yield rows of the plan's table: time by stages, memory."""
    stages = ", ".join(
        f"{stage} {_about(seconds)}"
        for stage, seconds in prediction.seconds.items()
        if seconds > 0 and stage not in WITHIN
    )
    yield "time", f"about {_about(prediction.total_seconds)}: {stages}"
    yield (
        "memory",
        f"at most about {format_bytes(prediction.peak_memory_bytes)}, libraries included",
    )
    device = prediction.probe.accelerator
    if prediction.device_memory_bytes is not None and device is not None:
        yield (
            "gpu memory",
            f"at most about {format_bytes(prediction.device_memory_bytes)} of "
            f"{format_bytes(device.total_bytes)}, {device.name}",
        )


def _about(seconds: float) -> str:
    """Tenths below ten seconds and whole seconds from there on: a prediction knows no more."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 59.5 else format_seconds(seconds)
