"""report.json: the report as plain data, unrounded, for other programs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from quantkit.records import (
    ArtifactReport,
    Check,
    CustomCheck,
    Details,
    Difference,
    DomainResult,
    Judgement,
    Measure,
    Metric,
    PositionRange,
    Report,
)
from quantkit.report.schema import SCHEMA


def report_document(report: Report) -> dict[str, Any]:
    """Return the report as JSON-ready data.

    Numbers are as the records have them; a NaN or an infinity, which JSON lacks, becomes None. What
    each key means stands in `schema.document_schema`.

    Raises:
        TypeError: the evidence holds something that JSON has no form for.
    """
    document: dict[str, Any] = _plain(
        {
            "schema": SCHEMA,
            "model": report.model,
            "verdict": report.verdict,
            "baseline": {"name": report.model, "size_bytes": report.baseline_bytes},
            "artifacts": [_artifact(artifact) for artifact in report.artifacts],
            "layers": [asdict(layer) for layer in report.layers],
            "kv_cache": [asdict(record) for record in report.kv_cache],
            "allocation": report.allocation and asdict(report.allocation),
            "comparison": report.comparison,
            "differences": [_difference(each) for each in report.differences],
            "baseline_footprint": report.baseline_footprint and asdict(report.baseline_footprint),
            "notes": report.notes,
            "evidence": report.evidence,
        }
    )
    return document


def render_json(report: Report) -> str:
    """Return report.json's text."""
    return json.dumps(report_document(report), indent=2, allow_nan=False) + "\n"


def _artifact(artifact: ArtifactReport) -> dict[str, Any]:
    judgement = artifact.judgement
    return {
        "name": artifact.name,
        "path": artifact.path,
        "format": artifact.format,
        "scheme": artifact.scheme,
        "size_bytes": artifact.size_bytes,
        "bits_per_weight": artifact.bits_per_weight,
        "runtime": artifact.runtime,
        "task": artifact.task,
        "metrics": _metrics(judgement),
        "measures": [_measure(measure) for measure in judgement.measures],
        "speed": [asdict(speed) for speed in judgement.speed],
        "checks": [
            *(_check(check) for check in judgement.checks),
            *(_custom_check(check) for check in judgement.custom_checks),
        ],
        "verdict": judgement.verdict,
        "reasons": judgement.reasons,
        "confidence": judgement.confidence,
        "windows": judgement.windows,
        "looks": list(judgement.looks),
        "measured_with": judgement.measured_with,
        "details": judgement.details and _details(judgement.details),
        "probes": [asdict(probe) for probe in judgement.probes],
        "tasks": [asdict(task) for task in judgement.tasks],
        "footprint": judgement.footprint and asdict(judgement.footprint),
    }


def _metrics(judgement: Judgement) -> dict[str, Any]:
    """What was measured; None for what was not."""
    perplexity, kl, agreement = judgement.perplexity, judgement.kl, judgement.top1_agreement
    return {
        "perplexity": perplexity
        and {
            "baseline": perplexity.baseline,
            "value": perplexity.value,
            "increase": perplexity.increase,
            **_interval(perplexity),
        },
        "kl": kl and {"mean": kl.value, "p99": kl.p99, "max": kl.maximum, **_interval(kl)},
        "top1_agreement": agreement and _value(agreement),
    }


def _measure(measure: Measure) -> dict[str, Any]:
    metric = measure.metric
    shown = {"name": measure.name, "baseline": metric.baseline, "value": metric.value}
    return shown | _interval(metric)


def _details(details: Details) -> dict[str, Any]:
    return {
        "reverse_kl": _value(details.reverse_kl),
        "top5_agreement": _value(details.top5_agreement),
        "flips": _value(details.flips),
        "lost": details.lost,
        "positions": [_positions(each) for each in details.positions],
        "domains": [_domain(each) for each in details.domains],
        "partings": [asdict(parting) for parting in details.partings],
        "generations": [asdict(generation) for generation in details.generations],
        "windows": {
            "numbers": details.windows,
            "baseline_nll": details.baseline_nll,
            "artifact_nll": details.artifact_nll,
            "kl": details.kl,
        },
    }


def _positions(positions: PositionRange) -> dict[str, Any]:
    return {
        "start": positions.start,
        "stop": positions.stop,
        "kl": _value(positions.kl),
        "top1_agreement": _value(positions.top1_agreement),
    }


def _domain(domain: DomainResult) -> dict[str, Any]:
    return asdict(domain) | {"kl": _value(domain.kl)}


def _difference(difference: Difference) -> dict[str, Any]:
    return asdict(difference) | {"kl": _value(difference.kl)}


def _value(metric: Metric) -> dict[str, float]:
    return {"value": metric.value, **_interval(metric)}


def _interval(metric: Metric) -> dict[str, float]:
    return {"low": metric.low, "high": metric.high}


def _check(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "limit": check.limit,
        "value": check.value,
        "low": check.low,
        "high": check.high,
        "verdict": check.verdict,
        "custom": None,
    }


def _custom_check(check: CustomCheck) -> dict[str, Any]:
    """As `_check`, for one of the user's own, which has no interval."""
    return {
        "name": check.name,
        "limit": check.limit,
        "value": check.value,
        "low": None,
        "high": None,
        "verdict": check.verdict,
        "custom": {
            "detail": check.detail,
            "function": check.function,
            "sha256": check.sha256,
        },
    }


def _plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, paths as text, non-finite numbers as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a report cannot hold a {type(value).__name__}: {value!r}")
