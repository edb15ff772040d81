"""`quantkit plan`: what a job would do, before any weight is read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import quantkit
from quantkit.cli.console import Reply, make_table
from quantkit.cli.options import (
    JsonOption,
    ModelArgument,
    ModelOption,
    OutputOption,
    OverridesOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    given,
    one_model,
)
from quantkit.inputs import check_inputs, load
from quantkit.records import LinearPlan, Plan
from quantkit.report.rounding import format_bytes, format_ratio

EXAMPLE = "Example: quantkit plan MODEL --recipe awq4"


def plan(
    recipe: RecipeOption,
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    output: OutputOption = None,
    overrides: OverridesOption = None,
    overwrite: OverwriteOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Show what a job would do: layers, size, memory, disk, and every problem.

    Reads the config and the headers only.
    """
    model = one_model(model_argument, model)
    # What the files alone can refuse is answered before torch is loaded, which takes seconds.
    loaded = load(recipe, model, output, overrides or ())
    check_inputs(loaded, overwrite=bool(overwrite), output_needed=False)
    options = given(model=model, output=output, overrides=overrides, overwrite=overwrite)
    found = quantkit.plan(recipe, **options)
    return Reply(_document(found), _lines(found))


def _linears(plan: Plan) -> list[LinearPlan]:
    return [linear for block in plan.blocks for group in block.groups for linear in group.linears]


def _document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: schemes and methods by name."""
    return {
        "model": plan.model,
        "family": plan.family,
        "blocks": len(plan.blocks),
        "parameters": plan.parameters,
        "baseline_bytes": plan.baseline_bytes,
        "artifact_bytes": plan.artifact_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "block_bytes": plan.block_bytes,
        "activation_bytes": plan.activation_bytes,
        "statistics_bytes": plan.statistics_bytes,
        "disk_bytes": plan.disk_bytes,
        "notes": list(plan.notes),
        "linears": [
            {
                "name": linear.name,
                "shape": [linear.out_features, linear.in_features],
                "scheme": linear.scheme.name,
                "group_size": linear.group_size if linear.quantized else None,
                "method": linear.method.name if linear.quantized else None,
            }
            for linear in _linears(plan)
        ],
    }


def _lines(plan: Plan) -> list[Any]:
    linears = _linears(plan)
    treatments = Counter(_treatment(linear) for linear in linears)
    size, original = format_bytes(plan.artifact_bytes), format_bytes(plan.baseline_bytes)
    ratio = format_ratio(plan.artifact_bytes, plan.baseline_bytes)
    memory = plan.block_bytes + plan.activation_bytes + plan.statistics_bytes
    rows = (
        ("model", f"{plan.model} ({plan.parameters:,} weights, family {plan.family})"),
        (
            "blocks",
            f"{len(plan.blocks)} of {len(linears) // max(1, len(plan.blocks))} linear layers",
        ),
        *(("layers", f"{count} x {treatment}") for treatment, count in treatments.items()),
        ("size", f"{size} of {original}, {ratio}"),
        ("bits per weight", f"{plan.bits_per_weight:.2f}"),
        (
            "memory",
            f"{format_bytes(memory)} besides the libraries: one block, its inputs, statistics",
        ),
        ("disk", f"{format_bytes(plan.disk_bytes)} needed at the output"),
        *(("note", note) for note in plan.notes),
    )
    return [make_table(rows), "No problem found."]


def _treatment(linear: LinearPlan) -> str:
    if not linear.quantized:
        return "left in 16 bits"
    group = "one scale a row" if linear.group_size is None else f"group size {linear.group_size}"
    return f"{linear.scheme.name}, {group}, {linear.method.name}"
