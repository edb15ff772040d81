"""`quantkit runtimes`: what artifacts run in, where each is, and how to get the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from quantkit.cli.console import Reply, show_progress
from quantkit.cli.helping import HelpfulCommand, HelpfulGroup
from quantkit.cli.layout import Cell, make_table
from quantkit.cli.options import JsonOption, OverridesOption, OverwriteOption, QuietOption
from quantkit.environments.places import RUNTIMES, runtimes_folder
from quantkit.errors import RecipeError
from quantkit.judging.abilities import RuntimeFindings, examine_runtime, examine_runtimes
from quantkit.recipe import apply_overrides, load_recipe, validate

app = typer.Typer(
    name="runtimes",
    cls=HelpfulGroup,
    help="Find, install and remove what artifacts are run in.",
    epilog="Example: quantkit runtimes list",
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(RUNTIMES)}.")]
FolderOption = Annotated[
    str | None,
    typer.Option(
        "--folder", metavar="FOLDER", help="Of the environments, in place of $QUANTKIT_RUNTIMES."
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="Takes the interpreters of its gate."),
]

_HEADINGS = {
    "version": "version",
    "computes_on": "computes on",
    "generation": "generation",
    "kv_cache": "KV cache",
    "loads": "loads",
}


@app.command("list", cls=HelpfulCommand, epilog="Example: quantkit runtimes list")
def list_runtimes(
    recipe: RecipeOption = None,
    overrides: OverridesOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """List the runtimes: where the gate would take each from, and what it can do here."""
    found = examine_runtimes(_named(recipe, overrides or []))
    document = {
        "folder": str(runtimes_folder()),
        "runtimes": [findings_document(findings) for findings in found],
    }
    return Reply(document, [make_table(row for findings in found for row in _rows(findings))])


@app.command("install", cls=HelpfulCommand, epilog="Example: quantkit runtimes install vllm")
def install_runtime(
    name: NameArgument,
    folder: FolderOption = None,
    overwrite: OverwriteOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Make an environment for a runtime, with the tested versions; the gate then uses it."""
    from quantkit.environments.installing import install

    with show_progress(quiet) as progress:
        made = install(name, folder, overwrite=bool(overwrite), progress=progress)
    findings = examine_runtime(name, {name: str(made.python)})
    findings = replace(findings, where="its environment")
    document = {
        "folder": str(made.folder),
        "build": made.build,
        **findings_document(findings),
    }
    lines: list[Any] = [f"{name} is installed in {made.folder}", make_table(_rows(findings))]
    if made.folder.parent != runtimes_folder():
        lines.append(f"The gate finds it with QUANTKIT_RUNTIMES={made.folder.parent}")
    return Reply(document, lines, exit_code=0 if findings.works else 3)


@app.command("remove", cls=HelpfulCommand, epilog="Example: quantkit runtimes remove vllm")
def remove_runtime(
    name: NameArgument,
    folder: FolderOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Remove the environment of a runtime."""
    from quantkit.environments.installing import remove

    gone = os.fspath(remove(name, folder))
    return Reply({"runtime": name, "removed": gone}, [f"{gone} is removed"])


def findings_document(findings: RuntimeFindings) -> dict[str, Any]:
    """What programs are told about a runtime."""
    return {"found": findings.works, **asdict(findings)}


def _named(recipe: str | None, overrides: list[str]) -> dict[str, str]:
    """The interpreters that a recipe, or what is set beside it, names.

    Raises:
        RecipeError: the recipe is wrong, or something else is set.
    """
    for pair in overrides:
        if not pair.startswith("gate.python."):
            raise RecipeError(f"--set {pair!r}: only gate.python.NAME=PATH matters here")
    if recipe is not None:
        gate = load_recipe(recipe, overrides=overrides).gate
        return dict(gate.python) if gate is not None else {}
    tree: dict[str, Any] = {"version": 1, "gate": {"data": ""}}
    gate = validate(tree, places=apply_overrides(tree, overrides)).gate
    return dict(gate.python) if gate is not None else {}


def _rows(found: RuntimeFindings) -> Iterator[tuple[str, str, str | Cell]]:
    """Where a runtime is, and what it can do, or why it cannot and what to run."""
    if found.where == "nowhere":
        yield found.runtime, "not found", ""
    else:
        yield found.runtime, found.where, Cell(found.python or "", whole=True)
    if found.problem is not None:
        yield "", "broken", found.problem
    if found.abilities is not None:
        for name, value in asdict(found.abilities).items():
            yield "", _HEADINGS[name], value
    for note in found.notes:
        yield "", "note", note
    for line in found.advice:
        yield "", "to get it", Cell(line, whole=True)
