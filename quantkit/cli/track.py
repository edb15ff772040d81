"""`quantkit track`: log a finished job to MLflow."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.console import Reply
from quantkit.cli.options import JsonOption, QuietOption
from quantkit.cli.tracking import (
    MlflowModelOption,
    MlflowUploadOption,
    TrackingOptions,
    begin_run,
    describe_run,
    document_run,
)
from quantkit.errors import InputError

EXAMPLE = "Example: quantkit track artifacts/model-awq4 --mlflow quantization"


def track(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Output of `quantkit quantize`, or the reports of `gate` or `compare`.",
        ),
    ],
    mlflow: Annotated[
        str, typer.Option("--mlflow", metavar="EXPERIMENT", help="Where the run goes.")
    ],
    model: MlflowModelOption = None,
    upload: MlflowUploadOption = None,
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="ADDRESS", help="Where the artifact was published."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="ID", help="Go on with a run that exists."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Log a finished job to MLflow, now or again."""
    from quantkit.integrations.mlflow import finish_run, name_run, read_told

    if model is None and (upload or source is not None):
        raise InputError("--mlflow-upload and --source go with --mlflow-model NAME")
    told = read_told(folder)
    options = TrackingOptions(mlflow, model, bool(upload), source)
    opened = begin_run(options, name_run(told.document), run)
    logged = finish_run(opened, told, options.registration())
    return Reply({"exit_code": 0, "mlflow": document_run(logged)}, describe_run(logged, model))
