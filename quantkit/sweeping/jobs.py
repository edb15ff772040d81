"""Recipes and models -> the jobs of a sweep; what can be refused is refused here, all at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import InputError, PlanError, QuantkitError, RecipeError, ResourceError
from quantkit.inputs import LoadedRecipe, check_inputs, load
from quantkit.recipe import find_recipe
from quantkit.sweeping.records import SweepJob

REPORTS = "reports"
"""Folder of the output root; no job is called so, since a job's name has a hyphen."""


@dataclass(frozen=True)
class JobOptions:
    """What all jobs of a sweep are given, as `quantize` takes it."""

    overrides: tuple[str, ...] = ()
    device: str = "auto"
    overwrite: bool = False
    gate: bool = True


def make_jobs(
    recipes: Sequence[str | os.PathLike[str]],
    models: Sequence[str | os.PathLike[str]],
    root: Path,
    options: JobOptions,
) -> tuple[SweepJob, ...]:
    """Return a job for each recipe with each model, in this order; does not import torch.

    Args:
        recipes: files, or names of shipped recipes.
        models: replace the recipes' models; none: each recipe has its own.
        root: folder of all outputs.
        options: of all jobs.

    Raises:
        PlanError: recipes, models, data or outputs cannot be used; each problem with its recipe.
    """
    if not recipes:
        raise InputError("nothing to do: name at least one recipe")
    for pair in options.overrides:
        if pair.partition("=")[0].strip() in ("output", "model"):
            raise InputError(
                f"--set {pair}: a sweep takes its models from --model, and names outputs"
            )
    problems: list[str] = []
    jobs: list[SweepJob] = []
    named_models: list[str | None] = [os.fspath(model) for model in models]
    for recipe in [os.fspath(recipe) for recipe in recipes]:
        for model in named_models or [None]:
            try:
                jobs.append(_make_job(recipe, model, root, options))
            except QuantkitError as error:
                problems += tell_problems(recipe, error)
    problems += _find_clashes(jobs)
    for job in jobs:
        try:
            check_inputs(job.loaded, overwrite=True, gate=options.gate)
        except QuantkitError as error:
            problems += tell_problems(job.name, error)
    refuse(problems)
    return tuple(jobs)


def refuse(problems: Iterable[str], *, resources: bool = False) -> None:
    """Raise one error that lists `problems`, each once; nothing where there are none.

    Args:
        resources: memory or disk would run out, and nothing else is wrong.

    Raises:
        PlanError, ResourceError: there are some.
    """
    found = tuple(dict.fromkeys(problems))
    if not found:
        return
    error = PlanError(found)
    raise ResourceError(str(error)) if resources else error


def tell_problems(name: str, error: QuantkitError) -> list[str]:
    """Return a line for each problem that an error names, with the name of what has it."""
    lines = error.problems if isinstance(error, PlanError) else str(error).splitlines()
    return [line if line.startswith(f"{name}:") else f"{name}: {line}" for line in lines]


def _make_job(recipe: str, model: str | None, root: Path, options: JobOptions) -> SweepJob:
    """Raises RecipeError: the recipe cannot be used, or names no model."""
    overrides = options.overrides
    own = load(recipe, model, None, overrides).model
    name = f"{name_model(own)}-{find_recipe(recipe).stem}"
    output = root / name
    loaded: LoadedRecipe = load(recipe, model, output, overrides)
    if loaded.recipe.publish is not None:
        raise RecipeError(
            f"{recipe}: publish: a sweep does not publish what it compares; leave it out, and "
            f"`quantkit publish` the output of your choice"
        )
    command = ["quantize", "--recipe", recipe, "--output", str(output), "--json"]
    command += [] if model is None else ["--model", model]
    command += [word for pair in overrides for word in ("--set", pair)]
    command += [] if options.device == "auto" else ["--device", options.device]
    command += ["--overwrite"] * options.overwrite + ["--no-gate"] * (not options.gate)
    return SweepJob(name, recipe, loaded, tuple(command), root / f"{name}.log")


def name_model(model: str) -> str:
    """What outputs call a model: the last part of its path or Hub id, and its revision."""
    last = (
        Path(os.path.abspath(model)).name
        if os.path.isdir(model)
        else model.rstrip("/").rpartition("/")[2]
    )
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "model"


def _find_clashes(jobs: Sequence[SweepJob]) -> list[str]:
    """Name each output that two jobs would write."""
    first: dict[Path, SweepJob] = {}
    problems = []
    for job in jobs:
        other = first.setdefault(job.output, job)
        if other is not job:
            problems.append(
                f"{job.recipe} with {job.model}: {other.recipe} with {other.model} writes "
                f"{job.output} too: name each once, or rename one of them"
            )
    return problems
