"""What `quantkit plan` says of an encoder."""

from __future__ import annotations

from collections import Counter
from typing import Any

from quantkit.records import EncoderInfo, EncoderPlan, LinearPlan
from quantkit.report.rounding import format_bytes, format_ratio


def encoder_document(plan: EncoderPlan) -> dict[str, Any]:
    """Return the plan as JSON: schemes and methods by name."""
    info = plan.info
    return {
        "model": plan.model,
        "architecture": info.architecture,
        "task": info.task,
        "pooling": None if info.pooling is None else info.pooling.mode,
        "normalize": info.pooling is not None and info.pooling.normalize,
        "labels": list(info.labels),
        "max_length": info.max_length,
        "inputs": list(info.inputs),
        "precision": plan.precision,
        "parameters": plan.parameters,
        "baseline_bytes": plan.baseline_bytes,
        "artifact_bytes": plan.artifact_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "memory_bytes": plan.memory_bytes,
        "disk_bytes": plan.disk_bytes,
        "notes": list(plan.notes),
        "embeddings": dict.fromkeys(plan.tables, "int8"),
        "groups": [[linear.name for linear in group.linears] for group in plan.groups],
        "linears": [
            {
                "name": linear.name,
                "shape": [linear.out_features, linear.in_features],
                "scheme": linear.scheme.name,
                "method": linear.method.name if linear.quantized else None,
            }
            for linear in _linears(plan)
        ],
    }


def encoder_rows(plan: EncoderPlan) -> list[tuple[str, str]]:
    """Return the plan as rows of a table for people; its notes are apart."""
    linears = _linears(plan)
    treatments = Counter(_treatment(linear) for linear in linears)
    size, original = format_bytes(plan.artifact_bytes), format_bytes(plan.baseline_bytes)
    return [
        ("model", f"{plan.model} ({plan.parameters:,} weights, {plan.info.architecture})"),
        ("task", _describe_task(plan.info)),
        ("texts", f"up to {plan.info.max_length} tokens"),
        ("precision", plan.precision),
        *(("layers", f"{count} x {treatment}") for treatment, count in treatments.items()),
        ("embeddings", ", ".join(f"{name} in INT8" for name in plan.tables) or "in float"),
        ("size", f"{size} of {original}, {format_ratio(plan.artifact_bytes, plan.baseline_bytes)}"),
        ("bits per weight", f"{plan.bits_per_weight:.2f}"),
        ("memory", f"{format_bytes(plan.memory_bytes)} besides the libraries"),
        ("disk", f"{format_bytes(plan.disk_bytes)} needed at the output"),
    ]


def _linears(plan: EncoderPlan) -> list[LinearPlan]:
    return [linear for group in plan.groups for linear in group.linears]


def _describe_task(info: EncoderInfo) -> str:
    if info.pooling is None:
        return f"{info.task}, {len(info.labels)} label{'s' if len(info.labels) != 1 else ''}"
    length = ", divided by its length" if info.pooling.normalize else ""
    words = {"mean": "mean of the tokens", "cls": "first token", "max": "maximum of the tokens"}
    return f"{info.task}, {words[info.pooling.mode]}{length}"


def _treatment(linear: LinearPlan) -> str:
    if not linear.quantized:
        return "left in float"
    return f"{linear.scheme.name}, one scale a row, {linear.method.name}"
