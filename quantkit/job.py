"""A job made ready: everything that can be refused is refused here, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantkit.calibration.compute import ComputeProbe, choose_compute_dtype, choose_device
from quantkit.calibration.data import load_tokenizer, load_windows
from quantkit.calibration.doctor import check_overlap, check_vocabulary
from quantkit.checkpoint.reader import Checkpoint, hash_files
from quantkit.describe import describe_model, describe_plan, describe_windows, package_versions
from quantkit.exports import plan_gguf_files, plan_onnx_graphs
from quantkit.inputs import LoadedRecipe
from quantkit.planning import find_chosen, make_plan
from quantkit.recipe import MIN_WINDOWS, CalibrationSpec, GateSpec, Recipe
from quantkit.records import Allocation, GgufPlan, LinearPlan, Plan, TokenWindows


@dataclass(frozen=True)
class Job:
    """What all stages of a job need."""

    loaded: LoadedRecipe
    checkpoint: Checkpoint
    plan: Plan
    calibration: TokenWindows | None
    evaluation: TokenWindows | None
    device: torch.device
    dtype: torch.dtype
    probe: ComputeProbe | None
    model_files: Mapping[str, str]
    """File name -> sha256."""
    notes: tuple[str, ...]
    """What was noticed and did not stop the job."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales in the artifact."""
        dtype: torch.dtype = getattr(torch, self.plan.scale_dtype)
        return dtype


def prepare(loaded: LoadedRecipe, checkpoint: Checkpoint, *, device: str, gate: bool) -> Job:
    """Plan, and read all data.

    Raises:
        InputError, ResourceError: whatever would stop the job later.
    """
    recipe = loaded.recipe
    chosen_device = choose_device(device)
    plan = plan_job(recipe, checkpoint, gate=gate)
    calibration = evaluation = None
    calibrated = needs_calibration(plan)
    if calibrated or gate:
        tokenizer = load_tokenizer(checkpoint.source.folder)
    if calibrated and recipe.calibration is not None:
        calibration = load_calibration(recipe.calibration, tokenizer, checkpoint, plan)
    if gate and recipe.gate is not None:
        evaluation = load_evaluation(recipe.gate, tokenizer, checkpoint)
    dtype, probe = torch.float32, None
    if calibrated:
        scale_dtype: torch.dtype = getattr(torch, plan.scale_dtype)
        dtype, probe = choose_compute_dtype(chosen_device, scale_dtype)
    return Job(
        loaded=loaded,
        checkpoint=checkpoint,
        plan=plan,
        calibration=calibration,
        evaluation=evaluation,
        device=chosen_device,
        dtype=dtype,
        probe=probe,
        model_files=hash_files(checkpoint),
        notes=(*plan.notes, *_collect_notes(calibration, evaluation)),
    )


def plan_job(recipe: Recipe, checkpoint: Checkpoint, *, gate: bool = True) -> Plan:
    """Say what a job will do, its GGUF files and ONNX graphs included.

    Raises:
        InputError, ResourceError: as `make_plan`; or the checkpoint cannot become a GGUF file or
            an ONNX graph.
    """
    files, graphs = _plan_files(recipe, checkpoint), plan_onnx_graphs(recipe.export, checkpoint)
    return make_plan(recipe, checkpoint, gate=gate, gguf=files, onnx=graphs)


def _plan_files(
    recipe: Recipe, checkpoint: Checkpoint, chosen: Mapping[str, str] | None = None
) -> tuple[GgufPlan, ...]:
    weighed = recipe.quantize.method != "rtn"
    return plan_gguf_files(recipe.export, checkpoint, chosen, has_importance=weighed)


def settle(job: Job, allocation: Allocation) -> Job:
    """Return the job with the schemes or types chosen that its plan left open.

    Raises:
        InputError, ResourceError: as `make_plan`.
    """
    gate = job.evaluation is not None
    recipe = job.loaded.recipe
    chosen = {f"{name}.weight": choice for name, choice in find_chosen(allocation).items()}
    plan = make_plan(
        recipe,
        job.checkpoint,
        gate=gate,
        allocation=allocation,
        gguf=_plan_files(recipe, job.checkpoint, chosen),
        onnx=plan_onnx_graphs(recipe.export, job.checkpoint),
    )
    others = (note for note in job.notes if note not in job.plan.notes)
    return replace(job, plan=plan, notes=(*plan.notes, *others))


def _collect_notes(calibration: TokenWindows | None, evaluation: TokenWindows | None) -> list[str]:
    """Refuse an evaluation on calibration data; return what was noticed in data that is fit."""
    notes: list[str] = []
    for windows in (calibration, evaluation):
        if windows is not None:
            notes += windows.notes
    if calibration is not None and evaluation is not None:
        notes += check_overlap(calibration, evaluation)
    return notes


def load_calibration(
    spec: CalibrationSpec, tokenizer: Any, checkpoint: Checkpoint, plan: Plan
) -> TokenWindows:
    """Return the seeded windows of the calibration data.

    Raises:
        CalibrationError: the data does not suffice or does not fit the model.
    """
    windows = load_windows(
        spec.data,
        split=spec.split,
        text_column=spec.text_column,
        tokenizer=tokenizer,
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        assistant_only=spec.assistant_only,
        in_features=max((linear.in_features for linear in _calibrated(plan)), default=1),
    )
    _check_vocabulary(windows, checkpoint)
    return windows


def load_evaluation(spec: GateSpec, tokenizer: Any, checkpoint: Checkpoint) -> TokenWindows:
    """Return the first windows of the gate's data: all that it may measure.

    Raises:
        CalibrationError: the data does not suffice or does not fit the model.
    """
    windows = load_windows(
        spec.data,
        split=spec.split,
        text_column=spec.text_column,
        tokenizer=tokenizer,
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        order="sequential",
        at_most=spec.most_windows,
        domain_column=spec.domain_column,
    )
    _check_vocabulary(windows, checkpoint)
    count = len(windows.ids)
    if count >= MIN_WINDOWS:
        return windows
    few = (
        f"{count} evaluation windows decide nothing, and at least {MIN_WINDOWS} of "
        f"{spec.sequence_length} tokens are needed: the verdict will be INCONCLUSIVE without more "
        "text, a shorter gate.sequence_length or more gate.samples"
    )
    return replace(windows, notes=(*windows.notes, few))


def _check_vocabulary(windows: TokenWindows, checkpoint: Checkpoint) -> None:
    vocabulary = checkpoint.config.get("vocab_size")
    if isinstance(vocabulary, int):
        check_vocabulary(windows, vocabulary)


def needs_calibration(plan: Plan) -> bool:
    """Whether anything of the plan looks at calibration data."""
    return bool(_calibrated(plan)) or plan.kv_cache is not None or plan.choice is not None


def _calibrated(plan: Plan) -> list[LinearPlan]:
    return [linear for linear in plan.linears if linear.needs_statistics]


def depends_on(job: Job) -> dict[str, Any]:
    """What the solved blocks depend on: a resumed job must agree in all of it."""
    return {
        "model": describe_model(job.checkpoint.source, job.model_files)["files"],
        "plan": describe_plan(job.plan),
        "calibration": describe_windows(job.calibration),
        "compute": describe_compute(job),
        "versions": package_versions(),
    }


def describe_compute(job: Job) -> dict[str, str]:
    """Where and in which dtype the forward passes ran."""
    return {"device": job.device.type, "dtype": str(job.dtype).removeprefix("torch.")}
