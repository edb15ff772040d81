"""`quantkit calibrate`: statistics of a model, taken once for many recipes."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

import quantkit
from quantkit.cli.console import Reply, show_progress
from quantkit.cli.layout import Cell, Line, Sentence, make_table
from quantkit.cli.options import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    OverridesOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    given,
    one_model,
)
from quantkit.cli.process import load_for_good
from quantkit.inputs import check_inputs, load
from quantkit.report.rounding import format_bytes, format_seconds

if TYPE_CHECKING:
    from quantkit.records import Statistics

EXAMPLE = "Example: quantkit calibrate MODEL --recipe awq4 --output artifacts/model-statistics"


def calibrate(
    recipe: RecipeOption,
    output: Annotated[str, typer.Option("--output", metavar="FOLDER", help="Folder to make.")],
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    overrides: OverridesOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Walk a model once and store its statistics, for `quantize --stats` with many recipes.

    Of the recipe its model, its calibration and its effort are used.
    """
    model = one_model(model_argument, model)
    # What the files alone can refuse is answered before torch is loaded, which takes seconds.
    loaded = load(recipe, model, output, overrides or ())
    check_inputs(loaded, overwrite=bool(overwrite), gate=False)
    with show_progress(quiet) as progress:
        made = load_for_good(lambda: quantkit.calibrate)(
            recipe,
            output=output,
            **given(
                model=model,
                overrides=overrides,
                device=device,
                overwrite=overwrite,
                progress=progress,
            ),
        )
    return Reply(_document(made), _lines(made))


def _document(made: Statistics) -> dict[str, Any]:
    return {**asdict(made), "folder": str(made.folder)}


def _lines(made: Statistics) -> list[Line]:
    folder = str(made.folder)
    rows = (
        ("statistics", Cell(f"{folder} ({format_bytes(made.size_bytes)})", whole=True)),
        ("of", made.model),
        ("taken on", f"{made.windows} windows of {made.sequence_length} tokens: {made.source}"),
        ("inputs", f"{made.inputs} in {made.blocks} blocks"),
        ("time", format_seconds(sum(made.seconds.values()))),
    )
    return [
        make_table(rows),
        *(Sentence("lacks: ", line) for line in made.lacks),
        *(Sentence("note: ", note) for note in made.notes),
        f"next: quantkit quantize --recipe RECIPE --stats {shlex.quote(folder)} --output FOLDER",
    ]
