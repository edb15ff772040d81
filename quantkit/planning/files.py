"""What GGUF files mean for a plan: types of the layers, and a recipe that has no other format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from quantkit.planning.assignment import Assignment
from quantkit.recipe import QuantizeSpec, Recipe
from quantkit.records import GgufPlan, LinearPlan
from quantkit.schemes import METHODS


def without_schemes(recipe: Recipe) -> Recipe:
    """Return the recipe with no scheme for any layer where GGUF is its only format."""
    if any(export.format != "gguf" for export in recipe.export):
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


def _assign(spec: QuantizeSpec, linear: LinearPlan, files: Sequence[GgufPlan]) -> LinearPlan:
    """A layer without a scheme has no method of its own: it takes the recipe's rounder."""
    types = tuple(file.weights.get(f"{linear.name}.weight", "F32") for file in files)
    typed = replace(linear, ggml_types=types)
    if typed.quantized or not typed.encoded:
        return typed
    return replace(typed, method=METHODS["rtn" if spec.method == "rtn" else "gptq"])
