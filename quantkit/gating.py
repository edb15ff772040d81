"""The gate around a job or an artifact: which limits, which data, what comes of it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import InputError, RecipeError, WorkerError
from quantkit.evidence import find_runtime
from quantkit.inputs import RecipeLike, load
from quantkit.job import Job
from quantkit.judging.evaluate import evaluate
from quantkit.judging.suspicions import compare_bits_per_weight, compare_hashes
from quantkit.judging.verdict import judge
from quantkit.judging.worker import find_interpreter
from quantkit.recipe import GateSpec, apply_override, validate
from quantkit.records import Artifact, Judgement, Progress, TokenWindows


def check_runtime(job: Job) -> None:
    """Refuse a gate whose runtime cannot be started, before any work.

    Raises:
        InputError: the recipe names an interpreter that is not there.
    """
    spec = job.loaded.recipe.gate
    if spec is not None and job.evaluation is not None:
        check_interpreter(spec)


def check_interpreter(spec: GateSpec) -> None:
    """Refuse a runtime for which there is no interpreter.

    Raises:
        InputError: the recipe names a program that is not there, or none for a runtime that this
            environment lacks.
    """
    runtime = find_runtime(spec)
    python = spec.python.get(runtime)
    find_interpreter(python)
    if python is None and importlib.util.find_spec(runtime) is None:
        raise InputError(
            f"gate.runtime {runtime}: it is not installed here, and wants an environment of its "
            f"own; name its interpreter with --set gate.python.{runtime}=/path/to/python "
            f"(`make vllm` makes one in .venv-vllm)"
        )


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
            python=spec.python.get(find_runtime(spec)),
            runtime=find_runtime(spec),
            timeout_seconds=spec.timeout_seconds,
            device=device,
            progress=progress,
        )
    except WorkerError as error:
        return Judgement("FAIL", (), (str(error),), None, None, None, spec.confidence, 0)
    return judge(result, spec, suspicions=suspicions)


def find_gate_spec(
    recipe: RecipeLike | None,
    evidence: Mapping[str, Any],
    data: str | os.PathLike[str] | None,
    overrides: Sequence[str],
) -> GateSpec:
    """Limits and data: the recipe's, else those in the artifact's own evidence, else the defaults.

    Raises:
        InputError: no evaluation data is named, or an override is wrong.
    """
    for pair in overrides:
        if not pair.startswith("gate."):
            raise RecipeError(f"--set {pair!r}: only keys below `gate` matter here: gate.KEY=VALUE")
    if recipe is not None:
        spec = load(recipe, None, None, overrides).recipe.gate
    else:
        tree = {"version": 1, "gate": recorded_gate(evidence) or {"data": ""}}
        for pair in overrides:
            apply_override(tree, pair)
        spec = validate(tree).gate
    spec = spec or GateSpec(data="")
    if data is not None:
        spec = spec.model_copy(update={"data": os.fspath(data)})
    if not spec.data:
        raise InputError("no evaluation data: pass --data FILE, or a --recipe with a gate")
    return spec


def check_recorded_files(evidence: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Compare the files in `folder` with those that its own evidence names; return suspicions."""
    rows = evidence.get("artifacts")
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or row.get("path") != folder.absolute().name:
            continue
        files = row.get("files")
        if isinstance(files, dict):
            return compare_hashes(folder, {name: str(digest) for name, digest in files.items()})
    return ()


def recorded_gate(evidence: Mapping[str, Any]) -> Any:
    """The gate of the recipe that made the artifact, still to be validated.

    Without its interpreters: what to run on this machine is not for an artifact to say.
    """
    found: Any = evidence
    for key in ("recipe", "resolved", "gate"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return found
    return {key: value for key, value in found.items() if key != "python"}
