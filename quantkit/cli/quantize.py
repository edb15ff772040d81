"""`quantkit quantize`: the whole job."""

from __future__ import annotations

from typing import Annotated

import typer

import quantkit
from quantkit.cli.console import Reply, show_progress
from quantkit.cli.options import (
    DeviceOption,
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
from quantkit.cli.reports import quantize_reply

EXAMPLE = "Example: quantkit quantize MODEL --recipe awq4 --output artifacts/model-awq4"


def quantize(
    recipe: RecipeOption,
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    output: OutputOption = None,
    overrides: OverridesOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = None,
    gate: Annotated[
        bool | None,
        typer.Option(" /--no-gate", help="Do not judge; the artifact is marked UNJUDGED."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Quantize a model, judge the result and write a report."""
    recipe_options = given(
        model=one_model(model_argument, model), output=output, overrides=overrides
    )
    # A misspelt recipe is answered before torch is loaded, which takes seconds.
    quantkit.load_recipe(recipe, **recipe_options)
    with show_progress(quiet) as progress:
        result = quantkit.quantize(
            recipe,
            **recipe_options,
            **given(device=device, overwrite=overwrite, gate=gate, progress=progress),
        )
    return quantize_reply(result)
