"""`quantkit sweep`: many recipes and models, each job a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import quantkit
from quantkit.cli.console import Reply, printable, show_step, write
from quantkit.cli.options import (
    DeviceOption,
    JsonOption,
    OtelOption,
    OverridesOption,
    QuietOption,
    given,
)
from quantkit.cli.sweep_reply import sweep_reply
from quantkit.cli.tracking import sending
from quantkit.sweeping.jobs import JobOptions, make_jobs

if TYPE_CHECKING:
    from rich.progress import TaskID

    from quantkit.records import Event, Progress

EXAMPLE = "Example: quantkit sweep gptq4 awq4 --model models/demo-llama --processes 2"


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
        result = quantkit.sweep(
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
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _tell_line


def _tell_line(event: Event) -> None:
    if event.stage == "sweep":
        write(f"{_line(event)}\n", sys.stderr)


def _line(event: Event) -> str:
    return f"sweep {event.done}/{event.total}  {printable(event.message, keep='')}"


@contextmanager
def _bars() -> Iterator[Progress]:
    """The same lines, and below them a bar for each job that runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}", markup=False),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(event: Event) -> None:
            if event.stage == "sweep":
                bars.console.print(_line(event), markup=False, highlight=False, soft_wrap=True)
                ended = [name for name in tasks if event.message.startswith(f"{name}: ")]
                for name in ended:
                    bars.remove_task(tasks.pop(name))
                return
            show_step(bars, tasks, event)

        yield show
