"""quantkit.json and the report of an encoder's job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.describe import (
    Stopwatch,
    describe_artifact,
    describe_texts,
    package_versions,
    peak_memory_bytes,
)
from quantkit.encoder_pipeline.job import EncoderJob, layers_of
from quantkit.evidence import (
    collect_gate_notes,
    decide_verdict,
    describe_request,
    describe_runtimes,
    find_runtime,
)
from quantkit.records import (
    Artifact,
    ArtifactReport,
    EncoderPlan,
    Judgement,
    Report,
    SolvedEncoder,
    Verdict,
)


def build_encoder_report(
    job: EncoderJob,
    artifacts: Sequence[Artifact],
    judgements: Sequence[Judgement],
    solved: SolvedEncoder,
    watch: Stopwatch,
    root: Path,
) -> Report:
    """Put together what a job found; `root` is the folder that holds the artifacts."""
    spec = job.loaded.recipe.gate
    rows = tuple(
        ArtifactReport(
            name=artifact.name,
            path=artifact.folder.relative_to(root).as_posix(),
            format=artifact.format,
            scheme=describe_precision(plan),
            size_bytes=artifact.tensor_bytes,
            bits_per_weight=artifact.bits_per_weight,
            runtime=find_runtime(spec, artifact.format),
            judgement=judgement,
            task=job.info.task,
        )
        for artifact, plan, judgement in zip(artifacts, job.plans, judgements, strict=True)
    )
    verdict = decide_verdict(judgements)
    notes = (*job.notes, *solved.notes, *collect_gate_notes(rows))
    return Report(
        model=job.checkpoint.source.name,
        baseline_bytes=job.plans[0].baseline_bytes,
        artifacts=rows,
        verdict=verdict,
        layers=solved.records,
        notes=tuple(dict.fromkeys(notes)),
        evidence={
            **_collect_evidence(job, artifacts, verdict, solved, watch, root),
            "measured_with": describe_runtimes(rows),
        },
    )


def describe_precision(plan: EncoderPlan) -> str:
    """The schemes and methods of a plan in a few words, most used first; else its precision."""
    counts: dict[str, int] = {}
    for linear in layers_of(plan):
        if linear.quantized:
            words = f"{linear.scheme.name} channel {linear.method.name}"
            counts[words] = counts.get(words, 0) + 1
    found = sorted(counts, key=lambda words: (-counts[words], words)) or [plan.precision]
    if plan.tables:
        found.append("int8 embeddings")
    return ", ".join(found)


def _collect_evidence(
    job: EncoderJob,
    artifacts: Sequence[Artifact],
    verdict: Verdict,
    solved: SolvedEncoder,
    watch: Stopwatch,
    root: Path,
) -> dict[str, Any]:
    """All of quantkit.json, JSON-ready."""
    info = job.info
    return {
        **describe_request(job.loaded, job.checkpoint, job.model_files, verdict),
        "encoder": {
            "architecture": info.architecture,
            "task": info.task,
            "pooling": None if info.pooling is None else asdict(info.pooling),
            "max_length": info.max_length,
            "labels": list(info.labels),
            "inputs": list(info.inputs),
            "embeddings": {table.name: "int8" for table in solved.tables},
            "float_layers": list(solved.float_layers),
        },
        "versions": package_versions(),
        "compute": {"device": "cpu", "dtype": "float32"},
        "calibration": describe_texts(job.calibration),
        "evaluation": describe_texts(job.evaluation),
        "artifacts": [describe_artifact(artifact, root) for artifact in artifacts],
        "layers": [asdict(layer) for layer in solved.records],
        "timings": {
            "seconds": dict(watch.seconds),
            "peak_memory_bytes": peak_memory_bytes(),
        },
    }
