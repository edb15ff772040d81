"""`quantkit gate`: judge an artifact that exists."""

from __future__ import annotations

from typing import Annotated

import typer

import quantkit
from quantkit.cli.console import Reply, show_progress
from quantkit.cli.options import (
    DataOption,
    DeviceOption,
    GateRecipeOption,
    JsonOption,
    OtelOption,
    OverridesOption,
    OverwriteOption,
    QuietOption,
    check_there,
    given,
)
from quantkit.cli.process import load_for_good
from quantkit.cli.reports import gate_reply
from quantkit.cli.tracking import (
    MlflowModelOption,
    MlflowOption,
    MlflowUploadOption,
    TrackingOptions,
    name_job,
    sending,
    tracked,
)
from quantkit.inputs import check_gate_inputs, load
from quantkit.staging import gate_output

EXAMPLE = "Example: quantkit gate artifacts/model-awq4 --baseline MODEL --recipe awq4"


def gate(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="Folder of a quantized model, its output, or a GGUF or ONNX file.",
        ),
    ],
    baseline: Annotated[
        str,
        typer.Option("--baseline", metavar="MODEL", help="The original: Hub id or folder."),
    ],
    recipe: GateRecipeOption = None,
    data: DataOption = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="FOLDER", help="Where the report goes."),
    ] = None,
    overrides: OverridesOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    mlflow: MlflowOption = None,
    mlflow_model: MlflowModelOption = None,
    mlflow_upload: MlflowUploadOption = None,
    otel: OtelOption = False,
) -> Reply:
    """Judge a quantized model against its 16-bit original."""
    reports = gate_output(artifact, output)
    # What the files alone can refuse is answered before torch is loaded, which takes seconds.
    check_gate_inputs(reports, baseline, data, overwrite=bool(overwrite))
    check_there(artifact)
    if recipe is not None:
        load(recipe, None, None, overrides or ())
    tracking = TrackingOptions(mlflow, mlflow_model, bool(mlflow_upload))
    with sending(otel), tracked(tracking, name_job(artifact)) as track:
        with show_progress(quiet) as progress:
            report = load_for_good(lambda: quantkit.gate)(
                artifact,
                baseline=baseline,
                **given(
                    recipe=recipe,
                    data=data,
                    output=output,
                    overrides=overrides,
                    device=device,
                    overwrite=overwrite,
                    progress=progress,
                ),
            )
        return track(gate_reply(report, reports), reports)
