"""`quantkit bisect`: which layers make an artifact fail, and what would make it pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import quantkit
from quantkit.calibration.sources import find_kind
from quantkit.checkpoint.source import find_folder
from quantkit.cli.console import Reply, show_progress
from quantkit.cli.layout import Line, Sentence, make_table
from quantkit.cli.options import (
    DataOption,
    DeviceOption,
    GateRecipeOption,
    JsonOption,
    OverridesOption,
    QuietOption,
    check_there,
    given,
)
from quantkit.cli.process import load_for_good
from quantkit.inputs import load
from quantkit.locking import refuse_held
from quantkit.staging import check_output, partial_of

if TYPE_CHECKING:
    from quantkit.bisection.records import Bisection

EXAMPLE = "Example: quantkit bisect artifacts/model-awq4 --baseline MODEL --recipe awq4"


def bisect(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT", help="Folder of a quantized model, its output, or a GGUF file."
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
        typer.Option("--output", metavar="FOLDER", help="Writes bisect.json and bisect.md there."),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option("--windows", metavar="N", help="Windows on which layers are compared."),
    ] = None,
    overrides: OverridesOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Find the layers that make an artifact fail its gate, and what would make it pass.

    Puts the original's weights back block by block and layer by layer, and measures each time.
    """
    # What the files alone can refuse is answered before torch is loaded, which takes seconds.
    if output is not None:
        check_output(Path(output), overwrite=False)
        refuse_held(partial_of(Path(output)))
    find_folder(baseline)
    if data is not None:
        find_kind(data)
    check_there(artifact)
    if recipe is not None:
        load(recipe, None, None, overrides or ())
    with show_progress(quiet) as progress:
        found = load_for_good(lambda: quantkit.bisect)(
            artifact,
            baseline=baseline,
            **given(
                recipe=recipe,
                data=data,
                output=output,
                windows=windows,
                overrides=overrides,
                device=device,
                progress=progress,
            ),
        )
    return _reply(found)


def _reply(found: Bisection) -> Reply:
    from quantkit.bisection.words import list_facts, list_proposal, list_rows, make_document

    lines: list[Line] = ["", make_table(list_facts(found)), ""]
    for suspects in (found.blocks, found.units):
        lines += [make_table(list_rows(suspects), has_titles=True), ""] if suspects else []
    lines.append(Sentence(f"{found.outcome}  ", found.summary))
    lines += _list_proposal(list(list_proposal(found)))
    lines += [Sentence("note     ", note) for note in found.notes]
    return Reply(make_document(found), lines, found.exit_code)


def _list_proposal(told: list[str]) -> list[Line]:
    """Sentences, and as they are the lines for a recipe, which follow an empty one."""
    end = told.index("") if "" in told else len(told)
    return [*(Sentence("", line) for line in told[:end]), *told[end:]]
