"""What reaches the terminal: one reply on stdout; progress and errors on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

    from quantkit.records import Event, Progress

_EVERY_STEP = frozenset({"calibrate", "quantize", "write"})
"""Stages of which each step is worth a line: the blocks, the formats."""
_SECONDS_BETWEEN_LINES = 10.0
"""Of the other stages, whose steps are many and small."""
_UNBOUNDED_WIDTH = 1000


@dataclass(frozen=True)
class Reply:
    """What a command has to say: for programs, for people, and for the shell."""

    document: Mapping[str, Any] | Sequence[Any]
    """JSON-ready; the one document of `--json`."""
    lines: Sequence[RenderableType]
    """What people see; strings are printed as they are, without markup."""
    exit_code: int = 0


def render_reply(reply: Reply, *, as_json: bool, stdout: TextIO) -> str:
    """Return the text that goes to `stdout`: one JSON document, or lines for people."""
    return render_json(reply.document) if as_json else render_lines(reply.lines, stdout)


def print_error(message: str, exit_code: int, *, as_json: bool, stdout: TextIO) -> None:
    """Write `error: ...` to stderr and, for `--json`, the document that says the same."""
    write(f"error: {printable(message)}\n", sys.stderr)
    if as_json:
        write(render_json({"error": message, "exit_code": exit_code}), stdout)


def printable(text: str, keep: str = "\n") -> str:
    """Escape control characters but `keep`: texts quote bytes that strangers wrote."""
    return "".join(
        letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text
    )


def make_table(rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of names in bold and what is to be said about each, made printable.

    What has no room goes on in the next line: cut, names that begin alike would be the same.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, *cells in rows:
        if not table.columns:
            table.add_column(style="bold", overflow="fold")
            for _ in cells:
                table.add_column(overflow="fold")
        table.add_row(printable(name), *map(printable, cells))
    return table


def render_json(document: object) -> str:
    """Return `document` as JSON text that any parser reads: no NaN, no Infinity."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def render_lines(lines: Sequence[RenderableType], stream: TextIO) -> str:
    """Return rich renderables as text for `stream`: styled and wrapped only on a terminal."""
    from rich.console import Console

    terminal = stream.isatty()
    buffer = io.StringIO()
    width = None if terminal else _UNBOUNDED_WIDTH
    console = Console(file=buffer, force_terminal=terminal, width=width, highlight=False)
    for line in lines:
        if isinstance(line, str):
            console.print(printable(line, keep="\n\t"), markup=False, soft_wrap=True)
        else:
            console.print(line, markup=False)
    return "\n".join(row.rstrip() for row in buffer.getvalue().split("\n"))


def write(text: str, stream: TextIO) -> None:
    """Write and flush; when the other end of a pipe is closed, drop this and all that follows.

    Raises:
        OSError: the text cannot be written for another reason; what follows is dropped too.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # The interpreter flushes once more at exit and would complain then.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise


@contextmanager
def show_progress(quiet: bool) -> Iterator[Progress | None]:
    """Yield what the API calls after each step: bars on a terminal, lines without one."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _lines(sys.stderr)


@contextmanager
def _bars() -> Iterator[Progress]:
    """One bar a stage on stderr, with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[message]}", markup=False),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(event: Event) -> None:
            show_step(bars, tasks, event)

        yield show


def show_step(bars: Bars, tasks: dict[str, TaskID], event: Event) -> None:
    """Bring the bar of an event's stage to where it is; a stage without one gets it."""
    if event.stage not in tasks:
        tasks[event.stage] = bars.add_task(event.stage, message="")
    bars.update(
        tasks[event.stage],
        completed=event.done,
        total=event.total,
        message=printable(event.message),
    )


def _lines(stream: TextIO) -> Progress:
    """One line a block; of the other stages their ends, and now and then how far they are."""
    last: dict[str, float] = {}

    def show(event: Event) -> None:
        now = time.monotonic()
        waited = now - last.get(event.stage, now)
        last.setdefault(event.stage, now)
        ends = event.done in (0, event.total)
        if ends or event.stage in _EVERY_STEP or waited > _SECONDS_BETWEEN_LINES:
            last[event.stage] = now
            message = f"  {printable(event.message)}" if event.message else ""
            write(f"{event.stage} {event.done}/{event.total}{message}\n", stream)

    return show
