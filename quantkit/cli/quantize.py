"""`quantkit quantize`: the whole job."""

from __future__ import annotations

from typing import Annotated

import typer

import quantkit
from quantkit.capacity import read_memory
from quantkit.cli.console import Reply, show_progress
from quantkit.cli.options import (
    DeviceOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    ModelOption,
    OtelOption,
    OutputOption,
    OverridesOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    given,
    one_model,
)
from quantkit.cli.process import load_for_good, settle_for_a_limit
from quantkit.cli.reports import quantize_reply
from quantkit.cli.tracking import (
    MlflowModelOption,
    MlflowOption,
    MlflowUploadOption,
    TrackingOptions,
    name_job,
    sending,
    tracked,
)
from quantkit.inputs import check_inputs, load
from quantkit.ranks import read_ranks

EXAMPLE = "Example: quantkit quantize MODEL --recipe awq4 --output artifacts/model-awq4"


def quantize(
    recipe: RecipeOption,
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    output: OutputOption = None,
    statistics: Annotated[
        str | None,
        typer.Option(
            "--stats",
            metavar="FOLDER",
            help="Solve from what `quantkit calibrate` has stored, without a walk of the data.",
        ),
    ] = None,
    overrides: OverridesOption = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    overwrite: OverwriteOption = None,
    gate: Annotated[
        bool | None,
        typer.Option(" /--no-gate", help="Do not judge; the artifact is marked UNJUDGED."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    mlflow: MlflowOption = None,
    mlflow_model: MlflowModelOption = None,
    mlflow_upload: MlflowUploadOption = None,
    otel: OtelOption = False,
) -> Reply:
    """Quantize a model, judge the result and write a report."""
    model, most = one_model(model_argument, model), read_memory(memory)
    if most is not None:
        settle_for_a_limit()
    ranks = read_ranks()
    if ranks.size == 1:
        # What the files alone can refuse is answered before torch is loaded, which takes seconds.
        # Several processes meet first: one of them answers.
        loaded = load(recipe, model, output, overrides or ())
        check_inputs(
            loaded, overwrite=bool(overwrite), gate=gate is not False, statistics=statistics
        )
    tracking = TrackingOptions(mlflow, mlflow_model, bool(mlflow_upload))
    name = name_job(model, recipe)
    with sending(otel), tracked(tracking, name, leads=ranks.leads) as track:
        with show_progress(quiet or not ranks.leads) as progress:
            result = load_for_good(lambda: quantkit.quantize)(
                recipe,
                **given(
                    model=model,
                    output=output,
                    statistics=statistics,
                    overrides=overrides,
                    device=device,
                    memory=most,
                    overwrite=overwrite,
                    gate=gate,
                    progress=progress,
                ),
            )
        return track(quantize_reply(result), result.output)
