"""The options that several commands share; their names are the API's parameter names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.errors import ArtifactError, InputError, nearest

RecipeOption = Annotated[
    str,
    typer.Option("--recipe", metavar="RECIPE", help="A recipe file or the name of a shipped one."),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, id@revision or folder; as --model."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Replaces the recipe's model."),
]
OutputOption = Annotated[
    str | None,
    typer.Option("--output", metavar="FOLDER", help="Replaces the recipe's output."),
]
GateRecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="Takes data and limits from its gate."),
]
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="DATA", help="Evaluation text to use.")
]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Overrides any key of the recipe; may be repeated."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="auto|cpu|cuda", help="Where the model runs."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="The most that the job's process may hold, as 2GB; a file takes the rest.",
    ),
]
OverwriteOption = Annotated[
    bool | None,
    typer.Option("--overwrite", help="Replace an output that exists."),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead of text."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
OtelOption = Annotated[
    bool,
    typer.Option(
        "--otel",
        envvar="QUANTKIT_OTEL",
        help="Send spans and metrics to OpenTelemetry, as its OTEL_* variables say.",
    ),
]


def one_model(argument: str | None, option: str | None) -> str | None:
    """Return the model, which may be given as an argument or as `--model`.

    Raises:
        InputError: both are given and differ.
    """
    if argument is not None and option is not None and argument != option:
        raise InputError(
            f"the model is given twice, as {argument!r} and as --model {option!r}: give it once"
        )
    return option if argument is None else argument


def check_there(artifact: str) -> None:
    """Look before anything is loaded, which takes seconds.

    Raises:
        ArtifactError: nothing is at that path; what is called nearly so is named.
    """
    path = Path(artifact)
    if not path.exists():
        raise ArtifactError(f"there is no artifact at {path}{_find_near(path)}")


def _find_near(path: Path) -> str:
    """What may have been meant by a path that is not there."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    try:
        beside = [each for each in missing.parent.iterdir() if nearest(missing.name, [each.name])]
    except OSError:
        return ""
    return nearest(str(missing), map(str, beside))


def given(**values: Any) -> dict[str, Any]:
    """Return what was given on the command line; for the rest the API's own defaults hold."""
    return {name: value for name, value in values.items() if value is not None}
