"""YAML -> frozen `Recipe`. Every key of the design is known; what is not built yet is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from quantkit.errors import NotYetError, RecipeError
from quantkit.recipe.exporting import AUTO, ExportSpec, TypeOverride
from quantkit.recipe.judging import MIN_WINDOWS, GateSpec, ProbesSpec, TaskSpec
from quantkit.recipe.overriding import Overrides, apply_overrides, read_overrides
from quantkit.recipe.reading import (
    MAX_RECIPE_BYTES,
    KeyPath,
    Place,
    find_recipe,
    parse_recipe,
    read_recipe_text,
    shipped_folder,
    shipped_recipes,
)
from quantkit.recipe.refusals import explain, find_unbuilt, locate
from quantkit.recipe.solvers import GivenSolver, read_solvers
from quantkit.recipe.spec import (
    BEST,
    METHODS_GIVEN,
    CalibrationSpec,
    Override,
    PublishSpec,
    QuantizeSpec,
    Recipe,
    json_schema,
)
from quantkit.schemes import METHODS, Method

__all__ = [
    "AUTO",
    "BEST",
    "MAX_RECIPE_BYTES",
    "MIN_WINDOWS",
    "CalibrationSpec",
    "ExportSpec",
    "GateSpec",
    "GivenSolver",
    "Override",
    "Overrides",
    "ProbesSpec",
    "PublishSpec",
    "QuantizeSpec",
    "Recipe",
    "TaskSpec",
    "TypeOverride",
    "apply_overrides",
    "find_recipe",
    "json_schema",
    "load_recipe",
    "read_overrides",
    "read_recipe_text",
    "read_solvers",
    "shipped_folder",
    "shipped_recipes",
    "validate",
]

_MOST_PROBLEMS = 100
"""That are told at once: for each, the nearest known name is looked for."""


def load_recipe(
    recipe: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    solvers: Mapping[str, GivenSolver] = MappingProxyType({}),
) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name, and validate it.

    Args:
        recipe: path of a YAML file, or a name that `quantkit recipes list` shows.
        model: replaces the recipe's `model`.
        output: replaces the recipe's `output`.
        overrides: `KEY=VALUE` pairs as of `--set`, for instance `quantize.group_size=64`; or a
            mapping of such keys to values.
        solvers: that `quantize` will be given: their names are then methods too.

    Raises:
        InputError: as `read_solvers`.
        RecipeError: the file, a key or a value is wrong; the line is named.
        NotYetError: the recipe asks for something that is not built yet.
    """
    path = find_recipe(recipe)
    text = read_recipe_text(path)
    tree, lines = parse_recipe(text, path)
    places = apply_overrides(tree, read_overrides(overrides), lines)
    for key, value in (("model", model), ("output", output)):
        if value is not None:
            tree[key] = os.fspath(value)
            places.pop((key,), None)
    methods = read_solvers(solvers)
    return validate(tree, where=str(path), places=places, folder=path.parent, methods=methods)


def validate(
    tree: Mapping[str, Any],
    *,
    where: str = "recipe",
    places: Mapping[KeyPath, Place] | None = None,
    folder: Path | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> Recipe:
    """Make a `Recipe` from plain data; `places` says what gave the value of a key.

    A line in it is one of the file `where`.

    Relative paths that do not exist from the working folder are looked up from `folder`, then
    beside the shipped recipes, so that a copy of a shipped recipe works anywhere.

    Raises:
        RecipeError, NotYetError: as `load_recipe`.
    """
    try:
        recipe = Recipe.model_validate(tree, context={METHODS_GIVEN: methods})
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [explain(detail, where, places or {}) for detail in details[:_MOST_PROBLEMS]]
        if len(details) > _MOST_PROBLEMS:
            problems.append(f"{where}: and {len(details) - _MOST_PROBLEMS} more")
        raise RecipeError("\n".join(problems)) from None
    for key, feature in find_unbuilt(recipe):
        raise NotYetError(f"{locate(where, key, places or {})}: {feature} is not yet built")
    return _with_found_paths(recipe, folder) if folder else recipe


def _with_found_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Resolve relative input paths: working folder, the recipe's own, the shipped recipes'.

    Raises:
        RecipeError: one is none, for instance longer than a file system has names for.
    """

    def find(value: str) -> str:
        candidates = (Path(value), folder / value, shipped_folder().parent / value)
        try:
            found = next((path for path in candidates if path.exists()), Path(value))
        except OSError as error:
            shown = f"{value[:60]!r}..." if len(value) > 60 else repr(value)
            raise RecipeError(f"the recipe's path {shown}: {error.strerror}") from None
        return value if found == candidates[0] else str(found)

    changes: dict[str, Any] = {}
    if recipe.model:
        changes["model"] = find(recipe.model)
    if recipe.calibration:
        data = find(recipe.calibration.data)
        changes["calibration"] = recipe.calibration.model_copy(update={"data": data})
    if recipe.gate:
        changes["gate"] = _with_found_gate_paths(recipe.gate, find)
    return recipe.model_copy(update=changes)


def _with_found_gate_paths(gate: GateSpec, find: Callable[[str], str]) -> GateSpec:
    """Resolve the paths of data, of prompts and of tasks that are files."""
    changes: dict[str, Any] = {"data": find(gate.data)}
    if gate.probes is not None and gate.probes.prompts is not None:
        update = {"prompts": find(gate.probes.prompts)}
        changes["probes"] = gate.probes.model_copy(update=update)
    tasks = [TaskSpec(name=task) if isinstance(task, str) else task for task in gate.tasks]
    changes["tasks"] = tuple(
        task.model_copy(update={"name": find(task.name)})
        if task.name.endswith((".yaml", ".yml"))
        else task
        for task in tasks
    )
    return gate.model_copy(update=changes)
