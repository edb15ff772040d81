"""`quantkit compare`: many artifacts of one model in one report."""

from __future__ import annotations

from pathlib import Path
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
from quantkit.cli.tracking import sending
from quantkit.inputs import check_gate_inputs, load

EXAMPLE = "Example: quantkit compare MODEL artifacts/awq4 artifacts/fp8 --recipe awq4"


def compare(
    baseline: Annotated[
        str, typer.Argument(metavar="BASE", help="The original: Hub id or folder.")
    ],
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT...", help="Folders of quantized models, GGUF or ONNX files."
        ),
    ],
    recipe: GateRecipeOption = None,
    data: DataOption = None,
    output: Annotated[
        str, typer.Option("--output", metavar="FOLDER", help="Where the report goes.")
    ] = "comparison",
    overrides: OverridesOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = None,
    footprint: Annotated[
        bool | None,
        typer.Option(
            " /--no-footprint",
            help="Do not measure load time, memory and speed, for which each is loaded again.",
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    otel: OtelOption = False,
) -> Reply:
    """Measure quantized models side by side, each in its runtime: same tokens, one report.

    PASS means that at least one of them holds every limit.
    """
    # What the files alone can refuse is answered before torch is loaded, which takes seconds.
    check_gate_inputs(Path(output), baseline, data, overwrite=bool(overwrite))
    for artifact in artifacts:
        check_there(artifact)
    if recipe is not None:
        load(recipe, None, None, overrides or ())
    with sending(otel), show_progress(quiet) as progress:
        report = load_for_good(lambda: quantkit.compare)(
            baseline,
            artifacts,
            output=output,
            **given(
                recipe=recipe,
                data=data,
                overrides=overrides,
                device=device,
                overwrite=overwrite,
                footprint=footprint,
                progress=progress,
            ),
        )
    return gate_reply(report, Path(output))
