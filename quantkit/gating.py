"""The gate around a job or an artifact: which limits, which data, what comes of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import InputError, WorkerError
from quantkit.evidence import read_evidence
from quantkit.job import Job, RecipeLike, load
from quantkit.judging.evaluate import evaluate
from quantkit.judging.suspicions import compare_bits_per_weight, compare_hashes
from quantkit.judging.verdict import judge
from quantkit.recipe import GateSpec, apply_override, validate
from quantkit.records import Artifact, Judgement, Progress, TokenWindows


def judge_artifact(job: Job, artifact: Artifact, tell: Progress) -> Judgement:
    """Judge what a job wrote; without a gate it stays UNJUDGED."""
    spec = job.loaded.recipe.gate
    if spec is None or job.evaluation is None:
        return Judgement("UNJUDGED", (), ("the gate was not run",), None, None, None, 0.0, 0)
    return judge_files(
        job.checkpoint.source.folder,
        artifact.folder,
        job.evaluation,
        spec,
        device=job.device.type,
        suspicions=(
            *compare_bits_per_weight(artifact.bits_per_weight, job.plan.bits_per_weight),
            *compare_hashes(artifact.folder, artifact.files),
        ),
        progress=tell,
    )


def judge_files(
    baseline: Path,
    candidate: Path,
    windows: TokenWindows,
    spec: GateSpec,
    *,
    device: str,
    suspicions: Sequence[str],
    progress: Progress,
) -> Judgement:
    """Run both models in worker processes and judge; a worker that fails is a FAIL."""
    try:
        result = evaluate(
            baseline,
            candidate,
            windows,
            python=spec.python.get("transformers"),
            timeout_seconds=spec.timeout_seconds,
            device=device,
            progress=progress,
        )
    except WorkerError as error:
        return Judgement("FAIL", (), (str(error),), None, None, None, spec.confidence, 0)
    return judge(result, spec, suspicions=suspicions)


def find_gate_spec(
    recipe: RecipeLike | None,
    folder: Path,
    data: str | os.PathLike[str] | None,
    overrides: Sequence[str],
) -> GateSpec:
    """Limits and data: the recipe's, else the artifact's own, else the defaults.

    Raises:
        InputError: no evaluation data is named, or an override is wrong.
    """
    if recipe is not None:
        spec = load(recipe, None, None, overrides).recipe.gate
        spec = spec or GateSpec(data="")
    else:
        evidence = read_evidence(folder) or {}
        resolved = evidence.get("recipe", {}).get("resolved", {})
        tree = {"version": 1, "gate": resolved.get("gate") or {"data": ""}}
        for pair in overrides:
            apply_override(tree, pair)
        spec = validate(tree, where="gate").gate or GateSpec(data="")
    if data is not None:
        spec = spec.model_copy(update={"data": os.fspath(data)})
    if not spec.data:
        raise InputError("no evaluation data: pass --data FILE, or a --recipe with a gate")
    return spec
