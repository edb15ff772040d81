"""What reaches the terminal: one reply on stdout; progress and errors on stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from quantkit.cli.layout import Line, lay_out
from quantkit.cli.streams import encode_json, own
from quantkit.errors import printable

if TYPE_CHECKING:
    from quantkit.records import Event, Progress

_EVERY_STEP = frozenset({"calibrate", "quantize", "write"})
"""Stages of which each step is worth a line: the blocks, the formats."""
_SECONDS_BETWEEN_LINES = 10.0
"""Of the other stages, whose steps are many and small."""
_USUAL_WIDTH = 80


@dataclass(frozen=True)
class Reply:
    """What a command has to say: for programs, for people, and for the shell."""

    document: Mapping[str, Any] | Sequence[Any]
    """JSON-ready; the one document of `--json`."""
    lines: Sequence[Line]
    """What people see."""
    exit_code: int = 0


class Answered(Exception):
    """The parser has the reply itself: nothing is left to do."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


def render_reply(reply: Reply, *, as_json: bool, stdout: TextIO) -> str:
    """Return the text that goes to `stdout`: one JSON document, or lines for people."""
    if not as_json:
        return render_lines(reply.lines, stdout)
    return encode_json(render_json(reply.document), stdout)


def print_error(message: str, exit_code: int, *, as_json: bool, stdout: TextIO) -> None:
    """Write `error: ...` to stderr and, for `--json`, the document that says the same.

    The exit code says that something failed even where neither can be written.
    """
    with suppress(OSError):
        write(f"error: {printable(message)}\n", sys.stderr)
    if as_json:
        with suppress(OSError):
            document = render_json({"error": message, "exit_code": exit_code})
            write(encode_json(document, stdout), stdout)


def render_json(document: object) -> str:
    """Return `document` as JSON text that any parser reads: no NaN, no Infinity.

    Letters that cannot be printed are escaped: JSON lets some through that a terminal acts upon.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    letters = (
        each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text
    )
    return "".join(letters) + "\n"


def render_lines(lines: Sequence[Line], stream: TextIO) -> str:
    """Return lines as text for `stream`: styled and wrapped only on a terminal."""
    if not stream.isatty():
        return render_plain(lines)
    from rich.console import Console
    from rich.text import Text

    width = measure_width(stream)
    laid = [spans for line in lines for spans in lay_out(line, width)]
    console = Console(file=stream, force_terminal=True, width=width, highlight=False)
    with console.capture() as captured:
        for spans in laid:
            row = Text.assemble(*spans)
            row.rstrip()
            console.print(row, soft_wrap=True)
    return captured.get()


def render_plain(lines: Sequence[Line]) -> str:
    """Return lines as text without styles, each sentence and row of a table in one line."""
    laid = (spans for line in lines for spans in lay_out(line, None))
    rows = ("".join(text for text, _ in spans) for spans in laid)
    return "".join(f"{row.rstrip()}\n" for row in rows)


def measure_width(stream: TextIO) -> int:
    """Return the columns of a terminal; COLUMNS says otherwise."""
    wanted = os.environ.get("COLUMNS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    with suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(stream.fileno()).columns or _USUAL_WIDTH
    return _USUAL_WIDTH


def is_lively(stream: TextIO) -> bool:
    """Whether lines that were written can be written again: on a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def write(text: str, stream: TextIO) -> None:
    """Write and flush; when nobody reads any more, drop this and all that follows.

    Raises:
        OSError: the text cannot be written for another reason; what follows is dropped too.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        unread = isinstance(error, BrokenPipeError) or _is_hung_up(error, stream)
        # The interpreter flushes once more at exit and would complain then.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if not unread:
            raise


def _is_hung_up(error: OSError, stream: TextIO) -> bool:
    """Whether `stream` is a terminal that was closed."""
    # Its other end answers EIO to everything then, also to the question whether it is a terminal.
    return error.errno == errno.EIO and _is_character_device(stream)


def _is_character_device(stream: TextIO) -> bool:
    import stat

    return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)


@contextmanager
def show_progress(quiet: bool) -> Iterator[Progress | None]:
    """Yield what the API calls after each step: bars on a terminal, lines without one."""
    if quiet:
        yield None
    elif is_lively(own(sys.stderr)):
        from quantkit.cli.bars import show_stages

        with show_stages(own(sys.stderr)) as progress:
            yield progress
    else:
        yield _lines(own(sys.stderr))


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
            message = f"  {printable(event.message, keep='')}" if event.message else ""
            # A job is not lost because its progress cannot be written.
            with suppress(OSError):
                write(f"{event.stage} {event.done}/{event.total}{message}\n", stream)

    return show
