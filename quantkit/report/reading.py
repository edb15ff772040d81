"""report.json -> the records that it was written from."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, Union, get_args, get_origin, get_type_hints

from quantkit.records import (
    Allocation,
    ArtifactReport,
    Check,
    CustomCheck,
    Details,
    DomainResult,
    Footprint,
    Generation,
    Judgement,
    KvRecord,
    LayerRecord,
    Measure,
    Metric,
    Parting,
    PositionRange,
    Probe,
    Report,
    Speed,
    TaskResult,
)
from quantkit.report.field_types import check_types


def read_report(document: Mapping[str, Any]) -> Report:
    """Return the report of a job, whose artifacts do not compete.

    The notes on single artifacts are among those of the whole.

    Raises:
        ValueError: it is no document of `report_document`, or one of a comparison.
    """
    with _refusing("report"):
        found = _read_report(document)
        check_types(found)
        return found


def _read_report(document: Mapping[str, Any]) -> Report:
    if document["comparison"]:
        raise ValueError("it compares artifacts")
    allocation = document["allocation"]
    return Report(
        model=document["model"],
        baseline_bytes=document["baseline"]["size_bytes"],
        artifacts=tuple(_read_artifact(row, whole=True) for row in document["artifacts"]),
        verdict=document["verdict"],
        layers=_read_all(LayerRecord, document["layers"]),
        notes=tuple(document["notes"]),
        evidence=document["evidence"],
        kv_cache=_read_all(KvRecord, document["kv_cache"]),
        allocation=allocation and _read(Allocation, allocation),
    )


def read_artifact(row: Mapping[str, Any], *, whole: bool = False) -> ArtifactReport:
    """Return one of the artifacts of `report_document`.

    A null that stands for a number that is not finite is read as a NaN.

    Args:
        row: of the document.
        whole: with positions and kinds of text, which a comparison does not show.

    Raises:
        ValueError: it is no artifact of such a document.
    """
    with _refusing("artifact"):
        found = _read_artifact(row, whole=whole)
        check_types(found)
        return found


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn what comes of a document of another shape into one kind of error.

    Raises:
        ValueError: for whatever comes of it.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"it is no {what}: {type(error).__name__}: {error}") from None


def _read_artifact(row: Mapping[str, Any], *, whole: bool) -> ArtifactReport:
    keys = ("name", "path", "format", "scheme", "size_bytes", "bits_per_weight", "runtime", "task")
    return ArtifactReport(**{key: row[key] for key in keys}, judgement=_read_judgement(row, whole))


def _read_judgement(row: Mapping[str, Any], whole: bool) -> Judgement:
    metrics = row["metrics"]
    agreement = metrics["top1_agreement"]
    own = [check for check in row["checks"] if check.get("custom")]
    checks = [check for check in row["checks"] if check not in own]
    return Judgement(
        verdict=row["verdict"],
        checks=tuple(_read(Check, _without_custom(each)) for each in checks),
        reasons=tuple(row["reasons"]),
        perplexity=_read_perplexity(metrics["perplexity"]),
        kl=_read_kl(metrics["kl"]),
        top1_agreement=agreement and _read_metric(agreement),
        confidence=row["confidence"],
        windows=row["windows"],
        measured_with=row["measured_with"],
        measures=tuple(_read_measure(each) for each in row["measures"]),
        speed=_read_all(Speed, row["speed"]),
        looks=tuple(row["looks"]),
        details=row["details"] and _read_details(row["details"], whole),
        probes=_read_all(Probe, row["probes"]),
        tasks=_read_all(TaskResult, row["tasks"]),
        footprint=row["footprint"] and _read(Footprint, row["footprint"]),
        custom_checks=tuple(map(_read_custom, own)),
    )


def _without_custom(check: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in check.items() if key != "custom"}


def _read_custom(check: Mapping[str, Any]) -> CustomCheck:
    """A check of the user's own. Its numbers were finite: null is none."""
    numbers = {key: check[key] for key in ("name", "value", "limit", "verdict")}
    return CustomCheck(**numbers, **check["custom"])


def _read_metric(found: Mapping[str, Any]) -> Metric:
    return Metric(*(_number(found[key]) for key in ("value", "low", "high")))


def _read_perplexity(found: Mapping[str, Any] | None) -> Metric | None:
    if found is None:
        return None
    metric = _read_metric(found)
    return replace(metric, baseline=_number(found["baseline"]), increase=_number(found["increase"]))


def _read_kl(found: Mapping[str, Any] | None) -> Metric | None:
    if found is None:
        return None
    metric = _read_metric({**found, "value": found["mean"]})
    return replace(metric, p99=_number(found["p99"]), maximum=_number(found["max"]))


def _read_measure(found: Mapping[str, Any]) -> Measure:
    # None where there is no baseline to measure, unlike in a perplexity.
    return Measure(found["name"], replace(_read_metric(found), baseline=found["baseline"]))


def _read_details(found: Mapping[str, Any], whole: bool) -> Details:
    windows = found["windows"]
    return Details(
        reverse_kl=_read_metric(found["reverse_kl"]),
        top5_agreement=_read_metric(found["top5_agreement"]),
        flips=_read_metric(found["flips"]),
        lost=_number(found["lost"]),
        positions=_read_all(PositionRange, found["positions"]) if whole else (),
        domains=_read_all(DomainResult, found["domains"]) if whole else (),
        partings=_read_all(Parting, found["partings"]),
        generations=_read_all(Generation, found["generations"]),
        windows=tuple(windows["numbers"]),
        baseline_nll=tuple(map(_number, windows["baseline_nll"])),
        artifact_nll=tuple(map(_number, windows["artifact_nll"])),
        kl=tuple(map(_number, windows["kl"])),
    )


def _read_all(record: type[Any], rows: list[Any]) -> tuple[Any, ...]:
    hints = get_type_hints(record)
    return tuple(_make(record, hints, row) for row in rows)


def _read(record: type[Any], row: Mapping[str, Any]) -> Any:
    """Return a record from what `asdict` has made of it."""
    return _make(record, get_type_hints(record), row)


def _make(record: type[Any], hints: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    # The types of thousands of layers are looked up once.
    return record(
        **{each.name: _read_field(hints[each.name], row[each.name]) for each in fields(record)}
    )


def _read_field(hint: Any, value: Any) -> Any:
    if hint is float:
        return _number(value)
    if hint is Metric:
        return _read_metric(value)
    if is_dataclass(hint) and isinstance(hint, type):
        return _read(hint, value)
    inner = get_args(hint)
    if get_origin(hint) in (types.UnionType, Union):
        (kind,) = (each for each in inner if each is not type(None))
        return None if value is None else _read_field(kind, value)
    if get_origin(hint) is tuple:
        return tuple(_read_field(inner[0], each) for each in value)
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
