"""What a tracking server is told of a report: parameters, metrics and tags by name.

All of it is taken from report.json, so that a job is logged the same at its end and years later.
The names stand in docs/tracking.md.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import find_inside
from quantkit.errors import InputError
from quantkit.records import Report, Result
from quantkit.report.document import report_document

PAGE = "report.json"


@dataclass(frozen=True)
class Told:
    """A report as plain data, and where its files are."""

    document: Mapping[str, Any]
    reports: Path | None
    """Folder of the pages; None where a report was given without one."""
    root: Path
    """What the paths of its artifacts are relative to."""


def read_told(result: Result | Report | str | os.PathLike[str]) -> Told:
    """Take a report from what `quantize`, `gate` or `compare` returned or left.

    Args:
        result: a folder is an output of `quantize`, or the reports of `gate` or `compare`.

    Raises:
        InputError: the folder holds no report.
        CheckpointError: report.json is damaged, or a link out of the folder.
    """
    if isinstance(result, Result):
        return Told(report_document(result.report), result.output / "report", result.output)
    if isinstance(result, Report):
        return Told(report_document(result), None, Path())
    folder = Path(result)
    for name, root in ((f"report/{PAGE}", folder), (PAGE, Path())):
        path = find_inside(folder, name)
        if path is not None:
            return Told(read_json(path), path.parent, root)
    raise InputError(
        f"{folder} holds no report/{PAGE} and no {PAGE}: name an output of `quantkit quantize`, or "
        f"the reports of `quantkit gate` or `quantkit compare`"
    )


def list_params(document: Mapping[str, Any]) -> dict[str, str]:
    """Name -> value of what the job was given: the recipe's keys flattened, model, versions."""
    evidence = document.get("evidence") or {}
    model = evidence.get("model") or {}
    recipe = (evidence.get("recipe") or {}).get("resolved") or {"gate": evidence.get("gate")}
    found = {
        "model": document.get("model"),
        "model.revision": model.get("revision"),
        "compute": evidence.get("compute"),
        "versions": evidence.get("versions"),
        "recipe": recipe,
    }
    # The model is told above, and the runtimes' programs are of this machine alone.
    dropped = re.compile(r"recipe\.(model|output|gate\.python\b.*)")
    flat = dict(_flatten(found))
    return {name: value for name, value in flat.items() if not dropped.fullmatch(name)}


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, _clean(f"{name}.{key}" if name else str(key)))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flatten(item, f"{name}.{number}")
    elif isinstance(value, list):
        if value:
            yield name, ", ".join(map(str, value))
    elif value is not None:
        yield name, str(value)


def list_metrics(document: Mapping[str, Any]) -> dict[str, float]:
    """Name -> number of what was measured; with several artifacts the name of each in front."""
    artifacts = document.get("artifacts") or []
    found: dict[str, Any] = {}
    for row in artifacts:
        start = f"{_clean(row['name'])}/" if len(artifacts) > 1 else ""
        found |= {f"{start}{name}": value for name, value in _artifact_metrics(row)}
    found["baseline_size_bytes"] = (document.get("baseline") or {}).get("size_bytes")
    timings = (document.get("evidence") or {}).get("timings") or {}
    seconds = timings.get("seconds") or {}
    found |= {f"seconds/{_clean(stage)}": taken for stage, taken in seconds.items()}
    found["peak_memory_bytes"] = timings.get("peak_memory_bytes")
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _artifact_metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    metrics = row.get("metrics") or {}
    kl, perplexity, top1 = (
        metrics.get(name) or {} for name in ("kl", "perplexity", "top1_agreement")
    )
    yield "kl_mean", kl.get("mean")
    yield "kl_p99", kl.get("p99")
    yield "kl_max", kl.get("max")
    yield "perplexity", perplexity.get("value")
    yield "perplexity_baseline", perplexity.get("baseline")
    yield "perplexity_increase", perplexity.get("increase")
    yield "top1_agreement", top1.get("value")
    for measure in row.get("measures") or ():
        yield _clean(measure["name"]), measure.get("value")
    for task in row.get("tasks") or ():
        yield f"task_recovery/{_clean(str(task.get('name')))}", task.get("recovery")
    yield "size_bytes", row.get("size_bytes")
    yield "bits_per_weight", row.get("bits_per_weight")
    yield "windows", row.get("windows")


def list_tags(document: Mapping[str, Any]) -> dict[str, str]:
    """Name -> value of what runs are found by."""
    artifacts = document.get("artifacts") or []
    tags = {
        "quantkit.verdict": str(document.get("verdict")),
        "quantkit.model": str(document.get("model")),
        "quantkit.format": ", ".join(dict.fromkeys(row["format"] for row in artifacts)),
        "quantkit.scheme": ", ".join(dict.fromkeys(row["scheme"] for row in artifacts)),
    }
    if len(artifacts) > 1:
        tags |= {
            f"quantkit.verdict.{_clean(row['name'])}": str(row["verdict"]) for row in artifacts
        }
    reasons = [reason for row in artifacts for reason in row.get("reasons") or ()]
    return tags | ({"quantkit.reasons": "\n".join(reasons)} if reasons else {})


def _clean(name: str) -> str:
    """Return `name` of the characters that MLflow takes in names on every system."""
    return re.sub(r"[^\w. /-]+", "_", name, flags=re.ASCII)
