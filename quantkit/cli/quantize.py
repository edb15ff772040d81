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
from quantkit.inputs import check_inputs, load
from quantkit.ranks import read_ranks

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
    model = one_model(model_argument, model)
    ranks = read_ranks()
    if ranks.size == 1:
        # What the files alone can refuse is answered before torch is loaded, which takes seconds.
        # Several processes meet first: one of them answers.
        loaded = load(recipe, model, output, overrides or ())
        check_inputs(loaded, overwrite=bool(overwrite), gate=gate is not False)
    with show_progress(quiet or not ranks.leads) as progress:
        result = quantkit.quantize(
            recipe,
            **given(
                model=model,
                output=output,
                overrides=overrides,
                device=device,
                overwrite=overwrite,
                gate=gate,
                progress=progress,
            ),
        )
    return quantize_reply(result)
