"""A job made ready: everything that can be refused is refused here, before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.compute import ComputeProbe, choose_compute_dtype, choose_device
from quantkit.calibration.data import load_tokenizer, load_windows
from quantkit.calibration.doctor import check_overlap, check_vocabulary
from quantkit.checkpoint.reader import Checkpoint, hash_files, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.describe import describe_model, describe_plan, describe_windows, package_versions
from quantkit.errors import RecipeError
from quantkit.planning import make_plan
from quantkit.recipe import (
    CalibrationSpec,
    GateSpec,
    Recipe,
    find_recipe,
    load_recipe,
    read_recipe_text,
)
from quantkit.records import Plan, TokenWindows
from quantkit.staging import check_output

RecipeLike = Recipe | str | os.PathLike[str]


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe and, where it came from a file, that file's text."""

    recipe: Recipe
    text: str | None
    overrides: tuple[str, ...]

    @property
    def model(self) -> str:
        """The model to work on.

        Raises:
            RecipeError: none is named.
        """
        if self.recipe.model is None:
            raise RecipeError("no model: name one on the command line or as `model:` in the recipe")
        return self.recipe.model

    @property
    def output(self) -> Path:
        """The folder to write.

        Raises:
            RecipeError: none is named.
        """
        if self.recipe.output is None:
            raise RecipeError("no output: pass --output or write `output:` in the recipe")
        return Path(self.recipe.output)


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


def load(
    recipe: RecipeLike,
    model: str | os.PathLike[str] | None,
    output: str | os.PathLike[str] | None,
    overrides: Sequence[str],
) -> LoadedRecipe:
    """Read and validate a recipe; a `Recipe` gets only its model and output replaced.

    Raises:
        RecipeError: as `load_recipe`; or overrides were given for a `Recipe`.
    """
    if not isinstance(recipe, Recipe):
        text = read_recipe_text(find_recipe(recipe))
        loaded = load_recipe(recipe, model=model, output=output, overrides=overrides)
        return LoadedRecipe(loaded, text, tuple(overrides))
    if overrides:
        raise RecipeError("overrides go with a recipe from a file: change the Recipe itself")
    changes = {"model": model, "output": output}
    given = {key: os.fspath(value) for key, value in changes.items() if value is not None}
    return LoadedRecipe(recipe.model_copy(update=given), None, ())


def prepare(loaded: LoadedRecipe, *, device: str, overwrite: bool, gate: bool) -> Job:
    """Check the output, open the checkpoint, plan, and read all data.

    Raises:
        InputError, ResourceError: whatever would stop the job later.
    """
    recipe = loaded.recipe
    check_output(loaded.output, overwrite=overwrite)
    chosen_device = choose_device(device)
    checkpoint = open_checkpoint(resolve_source(loaded.model))
    plan = make_plan(recipe, checkpoint, gate=gate)
    calibration = evaluation = None
    calibrated = needs_calibration(plan)
    if calibrated or gate:
        tokenizer = load_tokenizer(checkpoint.source.folder)
    if calibrated and recipe.calibration is not None:
        calibration = load_calibration(recipe.calibration, tokenizer, plan)
    if gate and recipe.gate is not None:
        evaluation = load_evaluation(recipe.gate, tokenizer)
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
        notes=(*plan.notes, *_check_data(calibration, evaluation, checkpoint)),
    )


def _check_data(
    calibration: TokenWindows | None, evaluation: TokenWindows | None, checkpoint: Checkpoint
) -> list[str]:
    """Refuse unfit data; return what was noticed in data that is fit."""
    notes: list[str] = []
    vocabulary = checkpoint.config.get("vocab_size")
    for windows in (calibration, evaluation):
        if windows is not None:
            notes += windows.notes
            if isinstance(vocabulary, int):
                check_vocabulary(windows, vocabulary)
    if calibration is not None and evaluation is not None:
        notes += check_overlap(calibration, evaluation)
    return notes


def load_calibration(spec: CalibrationSpec, tokenizer: Any, plan: Plan) -> TokenWindows:
    """Return the seeded windows of the calibration data."""
    widths = [
        linear.in_features
        for block in plan.blocks
        for group in block.groups
        for linear in group.linears
        if linear.quantized
    ]
    return load_windows(
        spec.data,
        split=spec.split,
        text_column=spec.text_column,
        tokenizer=tokenizer,
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        assistant_only=spec.assistant_only,
        in_features=max(widths),
    )


def load_evaluation(spec: GateSpec, tokenizer: Any) -> TokenWindows:
    """Return the first windows of the gate's data."""
    return load_windows(
        spec.data,
        split=spec.split,
        text_column=spec.text_column,
        tokenizer=tokenizer,
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        order="sequential",
    )


def needs_calibration(plan: Plan) -> bool:
    """Whether any quantized layer's method looks at statistics."""
    return any(
        linear.quantized and linear.method.needs_calibration
        for block in plan.blocks
        for group in block.groups
        for linear in group.linears
    )


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
