"""quantkit.json and the report: what an artifact was made from, with what, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.describe import (
    Stopwatch,
    describe_artifact,
    describe_model,
    describe_solvers,
    describe_texts,
    describe_windows,
    package_versions,
    peak_memory_bytes,
)
from quantkit.durable import write_words
from quantkit.formats.inspect import find_evidence
from quantkit.formats.inspected import Inspection
from quantkit.ggml_types import GGUF
from quantkit.inputs import LoadedRecipe
from quantkit.job import Job, describe_compute
from quantkit.recipe import GateSpec
from quantkit.records import (
    Artifact,
    ArtifactReport,
    Difference,
    Judgement,
    KvRecord,
    LayerRecord,
    OnnxPlan,
    Plan,
    Report,
    TextRows,
    TokenWindows,
    Verdict,
)
from quantkit.schemes import ONNX

_WORST_FIRST: tuple[Verdict, ...] = ("FAIL", "INCONCLUSIVE", "UNJUDGED", "PASS")


def build_report(
    job: Job,
    artifacts: Sequence[Artifact],
    judgements: Sequence[Judgement],
    layers: Sequence[LayerRecord],
    kv_cache: Sequence[KvRecord],
    watch: Stopwatch,
    root: Path,
) -> Report:
    """Put together what a job found; `root` is the folder that holds the artifacts."""
    rows = tuple(
        ArtifactReport(
            name=artifact.name,
            path=artifact.folder.relative_to(root).as_posix(),
            format=artifact.format,
            scheme=_name_scheme(job.plan, artifact),
            size_bytes=artifact.tensor_bytes,
            bits_per_weight=artifact.bits_per_weight,
            runtime=find_runtime(job.loaded.recipe.gate, artifact.format),
            judgement=judgement,
        )
        for artifact, judgement in zip(artifacts, judgements, strict=True)
    )
    verdict = decide_verdict(judgements)
    return Report(
        model=job.checkpoint.source.name,
        baseline_bytes=job.plan.baseline_bytes,
        artifacts=rows,
        verdict=verdict,
        layers=tuple(layers),
        notes=(*job.notes, *collect_gate_notes(rows)),
        evidence={
            **_collect_evidence(job, artifacts, verdict, layers, watch, root),
            "kv_cache": [asdict(record) for record in kv_cache],
            "allocation": job.plan.allocation and asdict(job.plan.allocation),
            "measured_with": describe_runtimes(rows),
            **describe_checks(rows),
        },
        kv_cache=tuple(kv_cache),
        allocation=job.plan.allocation,
    )


def find_graph_plan(plan: Plan, artifact: Artifact) -> OnnxPlan | None:
    """Return the plan of an ONNX artifact of a decoder; None for other formats."""
    if artifact.format != ONNX:
        return None
    # Several graphs lie in folders by the names of their precisions.
    named = [graph for graph in plan.onnx if graph.precision == artifact.folder.name]
    return next(iter(named or plan.onnx), None)


def _name_scheme(plan: Plan, artifact: Artifact) -> str:
    """What the layers of an artifact have: the type of a file, the precision of a float graph."""
    graph = find_graph_plan(plan, artifact)
    if graph is not None and not graph.quantized:
        return graph.precision
    return artifact.file_type or describe_scheme(plan)


@dataclass(frozen=True)
class JudgedArtifact:
    """An artifact that existed: what the report calls it, what is in it, what the gate found."""

    name: str
    path: str
    found: Inspection
    judgement: Judgement


def build_gate_report(
    judged: Sequence[JudgedArtifact],
    baseline: Checkpoint,
    evaluation: TokenWindows | TextRows,
    spec: GateSpec,
    watch: Stopwatch,
    notes: Sequence[str],
    *,
    task: str | None = None,
    comparison: bool = False,
    differences: Sequence[Difference] = (),
) -> Report:
    """Put together what a gate found on artifacts that were there before.

    Args:
        evaluation: what they were judged on.
        task: of encoders.
        comparison: the artifacts compete, and the report's verdict is the best of theirs.
        differences: of each pair of artifacts that compete.
    """
    described = (
        describe_texts(evaluation)
        if isinstance(evaluation, TextRows)
        else describe_windows(evaluation)
    )
    rows = tuple(
        ArtifactReport(
            name=each.name,
            path=each.path,
            format=each.found.format,
            scheme=each.found.scheme,
            size_bytes=each.found.tensor_bytes,
            bits_per_weight=each.found.bits_per_weight,
            runtime=find_runtime(spec, each.found.format),
            judgement=each.judgement,
            task=task,
        )
        for each in judged
    )
    return Report(
        model=baseline.source.name,
        baseline_bytes=sum(tensor.size for tensor in baseline.tensors.values()),
        artifacts=rows,
        verdict=decide_verdict([each.judgement for each in judged], comparison=comparison),
        layers=(),
        notes=tuple(dict.fromkeys([*notes, *collect_gate_notes(rows)])),
        evidence={
            "model": describe_model(baseline.source, {}),
            "gate": spec.model_dump(mode="json"),
            "evaluation": described,
            "versions": package_versions(),
            "measured_with": describe_runtimes(rows),
            **describe_checks(rows),
            "timings": {"seconds": dict(watch.seconds)},
        },
        comparison=comparison,
        differences=tuple(differences),
    )


def decide_verdict(judgements: Sequence[Judgement], *, comparison: bool = False) -> Verdict:
    """Return the worst verdict, or the best one of artifacts that compete."""
    found = {judgement.verdict for judgement in judgements}
    order = reversed(_WORST_FIRST) if comparison else _WORST_FIRST
    return next(candidate for candidate in order if candidate in found)


def find_runtime(spec: GateSpec | None, written: str) -> str:
    """Return the runtime that judges an artifact of the format `written`.

    `auto` is llama.cpp for GGUF files, onnxruntime for ONNX files, and transformers, which loads
    every scheme, for the rest.
    """
    if spec is not None and spec.runtime != "auto":
        return spec.runtime
    return {GGUF: "llama.cpp", ONNX: "onnxruntime"}.get(written, "transformers")


def collect_gate_notes(rows: Sequence[ArtifactReport]) -> list[str]:
    """Return what the gate did not do, of each artifact by its name."""
    return [f"{row.name}: {note}" for row in rows for note in row.judgement.notes]


def describe_runtimes(rows: Sequence[ArtifactReport]) -> dict[str, dict[str, str]]:
    """Return artifact -> what its runtime computed with, maybe in another interpreter than ours."""
    return {row.name: dict(row.judgement.measured_with) for row in rows}


def describe_checks(rows: Sequence[ArtifactReport]) -> dict[str, dict[str, str | None]]:
    """Return the user's own checks: function -> sha256 of its source; empty where there is none."""
    found = {check.function: check.sha256 for row in rows for check in row.judgement.custom_checks}
    return {"custom_checks": found} if found else {}


def _collect_evidence(
    job: Job,
    artifacts: Sequence[Artifact],
    verdict: Verdict,
    layers: Sequence[LayerRecord],
    watch: Stopwatch,
    root: Path,
) -> dict[str, Any]:
    """All of quantkit.json, JSON-ready."""
    return {
        **describe_request(job.loaded, job.checkpoint, job.model_files, verdict),
        "versions": package_versions(),
        "compute": describe_compute(job),
        **describe_solvers(job.plan),
        "calibration": describe_windows(job.calibration),
        **_describe_statistics(job),
        "evaluation": describe_windows(job.evaluation),
        "artifacts": [describe_artifact(artifact, root) for artifact in artifacts],
        "layers": [asdict(layer) for layer in layers],
        "timings": {
            "seconds": dict(watch.seconds),
            "peak_memory_bytes": peak_memory_bytes(),
            "predicted": None if job.plan.prediction is None else asdict(job.plan.prediction),
            "matmul_probe": None if job.probe is None else asdict(job.probe),
        },
    }


def _describe_statistics(job: Job) -> dict[str, Any]:
    """Which statistics of the original model the blocks were solved from, if they were."""
    stored = job.statistics
    if stored is None:
        return {}
    return {"statistics": {"of": "the original model", "sha256": stored.sha256}}


def describe_request(
    loaded: LoadedRecipe, checkpoint: Checkpoint, model_files: Mapping[str, str], verdict: Verdict
) -> dict[str, Any]:
    """What quantkit.json begins with: the verdict, what was asked for, and of which model.

    Args:
        model_files: file name -> sha256.
    """
    return {
        "schema": 1,
        "verdict": verdict,
        "recipe": {
            "text": loaded.text,
            "overrides": list(loaded.overrides),
            "resolved": loaded.recipe.model_dump(mode="json"),
        },
        "model": describe_model(checkpoint.source, model_files),
    }


def describe_scheme(plan: Plan) -> str:
    """The schemes, group sizes and methods of a plan in a few words, most used first."""
    counts: dict[str, int] = {}
    for linear in plan.linears:
        if linear.quantized:
            size = f"g{linear.group_size}" if linear.group_size else "channel"
            size = "tensor" if linear.one_scale else size
            words = f"{linear.scheme.name} {size} {linear.method.name}"
            counts[words] = counts.get(words, 0) + 1
    found = sorted(counts, key=lambda words: (-counts[words], words)) or ["none"]
    if plan.kv_cache is not None:
        found.append(f"fp8 KV cache{' per head' if plan.kv_cache.per_head else ''}")
    return ", ".join(found)


def write_evidence(evidence: Mapping[str, Any], folder: Path) -> None:
    """Write `quantkit.json` into `folder`."""
    write_words(folder / "quantkit.json", json.dumps(evidence, indent=2, ensure_ascii=False) + "\n")


def read_evidence(folder: Path) -> Mapping[str, Any]:
    """Return the evidence of the artifact whose files are in `folder`; empty where there is none.

    Raises:
        CheckpointError: it is there and is no JSON object.
    """
    path = find_evidence(folder)
    return {} if path is None else read_json(path)
