"""`quantkit sweep`: many recipes and models, each job a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import quantkit
from quantkit.cli.console import Reply, is_lively, write
from quantkit.cli.options import (
    DeviceOption,
    JsonOption,
    OtelOption,
    OverridesOption,
    QuietOption,
    given,
)
from quantkit.cli.process import load_for_good
from quantkit.cli.streams import own
from quantkit.cli.sweep_reply import sweep_reply
from quantkit.cli.tracking import sending
from quantkit.errors import printable
from quantkit.sweeping.jobs import JobOptions, make_jobs

if TYPE_CHECKING:
    from quantkit.cli.bars import Board
    from quantkit.records import Event, Progress

EXAMPLE = "Example: quantkit sweep gptq4 awq4 --model models/demo-llama --processes 2"

_STAGE = "sweep"
"""Of events about whole jobs; the others are about what runs within one."""


def sweep(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="Recipe files, or names of shipped recipes."),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Replaces the recipes' models; may be repeated: every recipe with every model.",
        ),
    ] = None,
    output_root: Annotated[
        str | None,
        typer.Option(
            "--output-root", metavar="FOLDER", help="Of outputs, logs and tables; by default sweep."
        ),
    ] = None,
    overrides: OverridesOption = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            metavar="N",
            help="Jobs that run at once, by default 1; they share the cores and the GPUs.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run the jobs on a cluster of Ray: auto, HOST:PORT, or local to start one.",
        ),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option("--cpus", metavar="N", help="Cores that each job asks Ray for."),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option("--gpus", metavar="N", help="GPUs that each job asks Ray for."),
    ] = None,
    device: DeviceOption = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite", help="Replace outputs that differ from what would be made."),
    ] = None,
    gate: Annotated[
        bool | None,
        typer.Option(" /--no-gate", help="Do not judge; the artifacts are marked UNJUDGED."),
    ] = None,
    fail_fast: Annotated[
        bool | None,
        typer.Option("--fail-fast", help="Start no further job after one that did not pass."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    otel: OtelOption = False,
) -> Reply:
    """Quantize by many recipes, each job a process of its own, and compare what comes out.

    Run again, it keeps what is finished and goes on with the rest.
    """
    # What the files alone can refuse is answered before torch is loaded, which takes seconds.
    options = JobOptions(tuple(overrides or ()), gate=gate is not False)
    make_jobs(recipes, models or (), Path(output_root or "sweep"), options)
    with sending(otel), _show(quiet) as progress:
        result = load_for_good(lambda: quantkit.sweep)(
            recipes,
            **given(
                models=models,
                output_root=output_root,
                overrides=overrides,
                processes=processes,
                ray=ray,
                cpus=cpus,
                gpus=gpus,
                device=device,
                overwrite=overwrite,
                gate=gate,
                fail_fast=fail_fast,
                progress=progress,
            ),
        )
    return sweep_reply(result)


@contextmanager
def _show(quiet: bool) -> Iterator[Progress | None]:
    """A line at the start and the end of each job; on a terminal also how far the others are."""
    if quiet:
        yield None
    elif is_lively(own(sys.stderr)):
        from quantkit.cli.bars import open_board

        with open_board(own(sys.stderr), transient=True) as board:
            yield lambda event: _draw(board, event)
    else:
        yield _tell_line


def _tell_line(event: Event) -> None:
    if event.stage == _STAGE:
        # A sweep is not lost because its progress cannot be written.
        with suppress(OSError):
            write(f"{_line(event)}\n", sys.stderr)


def _line(event: Event) -> str:
    return f"sweep {event.done}/{event.total}  {printable(event.message, keep='')}"


def _draw(board: Board, event: Event) -> None:
    """The same lines, and below them a bar for each job that runs."""
    if event.stage != _STAGE:
        board.show(event)
        return
    board.tell(_line(event))
    for name in [name for name in board.stages if event.message.startswith(f"{name}: ")]:
        board.drop(name)
