"""quantkit.json and the report: what an artifact was made from, with what, and what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.describe import (
    Stopwatch,
    describe_artifact,
    describe_model,
    describe_windows,
    package_versions,
    peak_memory_bytes,
)
from quantkit.durable import write_text
from quantkit.formats.inspect import Inspection, find_evidence
from quantkit.job import Job, describe_compute
from quantkit.recipe import GateSpec
from quantkit.records import (
    Artifact,
    ArtifactReport,
    Judgement,
    LayerRecord,
    Plan,
    Report,
    TokenWindows,
    Verdict,
)

_WORST_FIRST: tuple[Verdict, ...] = ("FAIL", "INCONCLUSIVE", "UNJUDGED", "PASS")


def build_report(
    job: Job,
    artifacts: Sequence[Artifact],
    judgements: Sequence[Judgement],
    layers: Sequence[LayerRecord],
    watch: Stopwatch,
    root: Path,
) -> Report:
    """Put together what a job found; `root` is the folder that holds the artifacts."""
    rows = tuple(
        ArtifactReport(
            name=artifact.name,
            path=artifact.folder.relative_to(root).as_posix(),
            format=artifact.format,
            scheme=describe_scheme(job.plan),
            size_bytes=artifact.tensor_bytes,
            bits_per_weight=artifact.bits_per_weight,
            runtime="transformers",
            judgement=judgement,
        )
        for artifact, judgement in zip(artifacts, judgements, strict=True)
    )
    found = {judgement.verdict for judgement in judgements}
    verdict = next(candidate for candidate in _WORST_FIRST if candidate in found)
    return Report(
        model=job.checkpoint.source.name,
        baseline_bytes=job.plan.baseline_bytes,
        artifacts=rows,
        verdict=verdict,
        layers=tuple(layers),
        notes=job.notes,
        evidence={
            **_collect_evidence(job, artifacts, verdict, layers, watch, root),
            "measured_with": _describe_runtimes(rows),
        },
    )


def build_gate_report(
    artifact: Path,
    found: Inspection,
    baseline: Checkpoint,
    windows: TokenWindows,
    spec: GateSpec,
    judgement: Judgement,
    watch: Stopwatch,
    notes: Sequence[str],
) -> Report:
    """Put together what a gate found on the artifact that the user calls `artifact`."""
    row = ArtifactReport(
        name=Path(os.path.abspath(artifact)).name,
        path=str(artifact),
        format=found.format,
        scheme=found.scheme,
        size_bytes=found.tensor_bytes,
        bits_per_weight=found.bits_per_weight,
        runtime="transformers",
        judgement=judgement,
    )
    return Report(
        model=baseline.source.name,
        baseline_bytes=sum(tensor.size for tensor in baseline.tensors.values()),
        artifacts=(row,),
        verdict=judgement.verdict,
        layers=(),
        notes=tuple(notes),
        evidence={
            "model": describe_model(baseline.source, {}),
            "gate": spec.model_dump(mode="json"),
            "evaluation": describe_windows(windows),
            "versions": package_versions(),
            "measured_with": _describe_runtimes([row]),
            "timings": {"seconds": dict(watch.seconds)},
        },
    )


def _describe_runtimes(rows: Sequence[ArtifactReport]) -> dict[str, dict[str, str]]:
    """Artifact -> what its runtime computed with; it may be another interpreter than ours."""
    return {row.name: dict(row.judgement.measured_with) for row in rows}


def _collect_evidence(
    job: Job,
    artifacts: Sequence[Artifact],
    verdict: Verdict,
    layers: Sequence[LayerRecord],
    watch: Stopwatch,
    root: Path,
) -> dict[str, Any]:
    """All of quantkit.json, JSON-ready."""
    loaded = job.loaded
    return {
        "schema": 1,
        "verdict": verdict,
        "recipe": {
            "text": loaded.text,
            "overrides": list(loaded.overrides),
            "resolved": loaded.recipe.model_dump(mode="json"),
        },
        "model": describe_model(job.checkpoint.source, job.model_files),
        "versions": package_versions(),
        "compute": describe_compute(job),
        "calibration": describe_windows(job.calibration),
        "evaluation": describe_windows(job.evaluation),
        "artifacts": [describe_artifact(artifact, root) for artifact in artifacts],
        "layers": [asdict(layer) for layer in layers],
        "timings": {
            "seconds": dict(watch.seconds),
            "peak_memory_bytes": peak_memory_bytes(),
            "matmul_probe": None if job.probe is None else asdict(job.probe),
        },
    }


def describe_scheme(plan: Plan) -> str:
    """The schemes, group sizes and methods of a plan in a few words, most used first."""
    counts: dict[str, int] = {}
    for block in plan.blocks:
        for group in block.groups:
            for linear in group.linears:
                if linear.quantized:
                    size = f"g{linear.group_size}" if linear.group_size else "channel"
                    words = f"{linear.scheme.name} {size} {linear.method.name}"
                    counts[words] = counts.get(words, 0) + 1
    return ", ".join(sorted(counts, key=lambda words: (-counts[words], words))) or "none"


def write_evidence(evidence: Mapping[str, Any], folder: Path) -> None:
    """Write `quantkit.json` into `folder`."""
    write_text(folder / "quantkit.json", json.dumps(evidence, indent=2, ensure_ascii=False) + "\n")


def read_evidence(folder: Path) -> Mapping[str, Any]:
    """Return the evidence of the artifact whose files are in `folder`; empty where there is none.

    Raises:
        CheckpointError: it is there and is no JSON object.
    """
    path = find_evidence(folder)
    return {} if path is None else read_json(path)
