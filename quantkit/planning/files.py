"""What GGUF files mean for a plan: types of layers, and a recipe that has no place for codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType

from torch import nn

from quantkit.checkpoint.structure import Structure
from quantkit.ggml_types import GGML_TYPES
from quantkit.planning.assignment import Assignment, assign
from quantkit.planning.auto import OpenAssignment
from quantkit.planning.onnx import has_schemes
from quantkit.recipe import QuantizeSpec, Recipe
from quantkit.records import Candidate, GgufPlan, LinearPlan, OpenUnit
from quantkit.schemes import METHODS


def without_schemes(recipe: Recipe) -> Recipe:
    """Return the recipe with no scheme for any layer where no format has a place for codes."""
    if any(has_schemes(export) for export in recipe.export):
        return recipe
    return recipe.model_copy(
        update={"quantize": recipe.quantize.model_copy(update={"scheme": "none"})}
    )


def assign_types(
    spec: QuantizeSpec, assignment: Assignment, files: Sequence[GgufPlan]
) -> Assignment:
    """Say which type each layer gets in each GGUF file."""
    if not files:
        return assignment
    linears = {name: _assign(spec, linear, files) for name, linear in assignment.linears.items()}
    return replace(assignment, linears=MappingProxyType(linears))


def find_open_types(
    recipe: Recipe, skeleton: nn.Module, structure: Structure, file: GgufPlan
) -> OpenAssignment:
    """Find what each layer can choose from where a GGUF file leaves the types of its tensors open.

    Nothing in llama.cpp makes one layer of several, so each is a unit of its own.
    """
    rest = assign(recipe.quantize, skeleton, structure)
    units = []
    for index, block in enumerate(structure.blocks):
        for linear in (rest.linears[name] for group in block.groups for name in group.linears):
            fitting = file.candidates.get(f"{linear.name}.weight")
            if fitting:
                units.append(OpenUnit(index, tuple(_try_types(recipe, linear, fitting))))
    return OpenAssignment(tuple(units), (rest,), tuple(_find_unusable(recipe, units)), ())


def _try_types(recipe: Recipe, linear: LinearPlan, fitting: Sequence[str]) -> Iterator[Candidate]:
    for name in fitting:
        typed = _with_types(recipe.quantize, linear, (name,))
        row_bytes = GGML_TYPES[name].row_bytes(linear.in_features)
        yield Candidate((typed,), linear.out_features * row_bytes)


def _find_unusable(recipe: Recipe, units: Sequence[OpenUnit]) -> Iterator[str]:
    """Yield what leaves nothing to choose or nothing to measure on."""
    if not units:
        yield "type auto has nothing to choose: every layer has a type of its own by an override"
    if recipe.calibration is None:
        yield (
            "type auto measures how sensitive layers are on calibration data: add a "
            "`calibration:` section with `data:`"
        )


def _assign(spec: QuantizeSpec, linear: LinearPlan, files: Sequence[GgufPlan]) -> LinearPlan:
    types = tuple(file.weights.get(f"{linear.name}.weight", "F32") for file in files)
    return _with_types(spec, linear, types)


def _with_types(spec: QuantizeSpec, linear: LinearPlan, types: tuple[str, ...]) -> LinearPlan:
    """A layer without a scheme has no method of its own: it takes the recipe's rounder."""
    typed = replace(linear, ggml_types=types)
    if typed.quantized or not typed.encoded:
        return typed
    return replace(typed, method=METHODS["rtn" if spec.method == "rtn" else "gptq"])
