"""Bars on a terminal, one a stage, which stay whole when it is resized or the job is suspended."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import ProgressColumn, Task, TaskID
from rich.text import Text

from quantkit.cli.streams import Droppable, Murmur
from quantkit.errors import printable

if TYPE_CHECKING:
    from quantkit.records import Event, Progress

_BARS = ((100, 30), (80, 15))
"""Columns of a bar from so many columns of the terminal on; narrower ones have none."""
_FULL, _EMPTY = "━", "─"


@dataclass
class Board:
    """The bars of a job's stages, and the lines above them."""

    stream: TextIO
    transient: bool
    bars: Bars
    stages: dict[str, TaskID]

    def show(self, event: Event) -> None:
        """Bring the bar of an event's stage to where it is; a stage without one gets it."""
        stage = printable(event.stage, keep="")
        if stage not in self.stages:
            self.stages[stage] = self.bars.add_task(stage, total=event.total, message="")
        self.bars.update(
            self.stages[stage],
            completed=event.done,
            total=event.total,
            message=printable(event.message, keep=""),
        )

    def tell(self, line: str) -> None:
        """Print a line above the bars, to stay there."""
        self.bars.console.print(Text(printable(line, keep="")), soft_wrap=True)

    def drop(self, stage: str) -> None:
        """Take a stage's bar away."""
        task = self.stages.pop(printable(stage, keep=""), None)
        if task is not None:
            self.bars.remove_task(task)

    def begin_again(self) -> None:
        """Draw all bars below what stands on the terminal now, which may be the shell's."""
        self.bars.stop()
        if not _has_keys(self.stream):
            return
        before, self.bars = self.bars, _make_bars(self.stream, self.transient)
        for task in before.tasks:
            again = self.bars.add_task(task.description, total=task.total, **task.fields)
            self.stages[task.description] = again
            self.bars.update(again, completed=task.completed)
            self.bars.tasks[-1].start_time = task.start_time
        self.bars.start()


@contextmanager
def show_stages(stream: TextIO) -> Iterator[Progress]:
    """Yield what draws one bar a stage on a terminal, with the time that is left."""
    with open_board(stream, transient=False) as board:
        yield board.show


@contextmanager
def open_board(stream: TextIO, *, transient: bool) -> Iterator[Board]:
    """Yield a board; at the end its bars stay, or go away where they are transient."""
    board = Board(stream, transient, _make_bars(stream, transient), {})
    board.bars.start()
    try:
        # What libraries print goes above the bars.
        with (
            redirect_stdout(_murmur(sys.stdout, board)),
            redirect_stderr(_murmur(sys.stderr, board)),
            _suspending(board),
        ):
            yield board
    finally:
        board.bars.stop()


def _murmur(stream: TextIO, board: Board) -> TextIO:
    return cast("TextIO", Murmur(stream, board.tell))


def _make_bars(stream: TextIO, transient: bool) -> Bars:
    file = cast("TextIO", Droppable(stream))
    console = Console(file=file, force_terminal=True, highlight=False)
    bars = Bars(console=console, transient=transient, redirect_stdout=False, redirect_stderr=False)
    bars.columns = (_Row(bars),)
    return bars


class _Row(ProgressColumn):
    """All of a bar's line, so that it is known what has room."""

    def __init__(self, bars: Bars) -> None:
        super().__init__()
        self._bars = bars

    def render(self, task: Task) -> Text:
        """Stage, bar, steps, time left or taken, message: of these the end is cut, if anything."""
        console, tasks = self._bars.console, self._bars.tasks
        stage = max(len(each.description) for each in tasks)
        steps = max(len(_count_steps(each)) for each in tasks)
        row = Text(f"{task.description:<{stage}} ", no_wrap=True, overflow="crop")
        length = next((bar for width, bar in _BARS if console.width >= width), 0)
        if length:
            row.append_text(_draw(task, length, plain=console.options.ascii_only))
        row.append(f"{_count_steps(task):>{steps}} ", "progress.download")
        row.append(f"{_tell_time(task):>5} ", "progress.remaining")
        row.append(task.fields["message"])
        # A terminal goes on to the next line when the last column is written.
        row.truncate(console.width - 1)
        return row


def _draw(task: Task, length: int, *, plain: bool) -> Text:
    full = round(length * min(1.0, task.completed / task.total)) if task.total else 0
    style = "bar.finished" if task.finished else "bar.complete"
    signs = ("=", "-") if plain else (_FULL, _EMPTY)
    return Text.assemble((signs[0] * full, style), (signs[1] * (length - full), "bar.back"), " ")


def _count_steps(task: Task) -> str:
    return f"{task.completed:.0f}/{task.total or 0:.0f}"


def _tell_time(task: Task) -> str:
    """The time that is left, or that it took."""
    seconds = task.finished_time if task.finished else task.time_remaining
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _has_keys(stream: TextIO) -> bool:
    """Whether the terminal is ours: in the background it is another's, and it may be closed."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextmanager
def _suspending(board: Board) -> Iterator[None]:
    """Leave whole bars and a cursor behind on Ctrl-Z, and begin below the shell's lines on `fg`."""

    def suspend(number: int, frame: FrameType | None) -> None:
        board.bars.stop()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # It was told to go on, or nobody could have told it and it was not suspended.
        signal.signal(signal.SIGTSTP, suspend)
        if not board.bars.live.is_started:
            board.begin_again()

    def go_on(number: int, frame: FrameType | None) -> None:
        board.begin_again()

    in_main_thread = threading.current_thread() is threading.main_thread()
    if sys.platform == "win32" or not in_main_thread:
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGTSTP, suspend), (signal.SIGCONT, go_on))
        if signal.getsignal(number) == signal.SIG_DFL
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
