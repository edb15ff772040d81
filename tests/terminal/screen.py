"""A terminal as a user has one: a pseudo-terminal that runs a command, and what it shows."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyte
import pytest

from quantkit.cli.main import main
from tests.cli.running import ROOT, environment

PATIENCE = 120.0
"""Seconds after which something that is waited for does not happen any more."""
ROWS = 40
_SCROLLED = 300
"""Rows that are looked at: what has scrolled away is looked at too."""
_STYLE = re.compile(r"\x1b\[(?:[0-9;]*m|[?]25[hl])")
_MOVES = re.compile(r"\x1b\[(?:[0-9;]*m|[?]25[hl]|[0-9]*[AK])|\r")
"""All that our own bars and styles need: colours, the cursor, a line up, an erased line."""


@dataclass(frozen=True)
class Shown:
    """What a command sent to its terminal, and how it ended."""

    sent: str
    width: int
    code: int

    @property
    def rows(self) -> list[str]:
        """The lines that a user sees, as a terminal of that width breaks them."""
        return draw(self.sent, self.width)

    @property
    def text(self) -> str:
        """What was sent, without styles: a line is as long as it was written."""
        return _STYLE.sub("", self.sent).replace("\r\n", "\n")

    @property
    def is_harmless(self) -> bool:
        """Whether nothing is in it that a terminal acts upon, but for what our own words need."""
        return all(each.isprintable() or each in "\n\t" for each in _MOVES.sub("", self.sent))


def draw(sent: str, width: int) -> list[str]:
    """The rows of a terminal that got `sent`, without the empty ones at the end."""
    screen = pyte.Screen(width, _SCROLLED)
    pyte.Stream(screen).feed(sent)
    return "\n".join(row.rstrip() for row in screen.display).rstrip("\n").split("\n")


def resize(terminal: int, width: int) -> None:
    """Give a terminal another width; who runs in it is told so by the kernel."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, width, 0, 0))


def show_here(
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str | Path,
    width: int = 80,
    encoding: str = "utf-8",
    folder: Path | None = None,
    **changes: str,
) -> Shown:
    """Run a command in this process, whose stdout and stderr are a terminal meanwhile."""
    ours, theirs = pty.openpty()
    resize(theirs, width)
    pieces: list[bytes] = []
    reader = threading.Thread(target=lambda: pieces.extend(_read(ours)))
    reader.start()
    with monkeypatch.context() as patch, contextlib.chdir(folder or Path.cwd()):
        _set_environment(patch, changes)
        try:
            with (
                open(os.dup(theirs), "w", encoding=encoding) as stdout,
                open(os.dup(theirs), "w", encoding=encoding) as stderr,
            ):
                patch.setattr(sys, "stdout", stdout)
                patch.setattr(sys, "stderr", stderr)
                code = main([*map(str, arguments)])
        finally:
            os.close(theirs)
            reader.join()
            os.close(ours)
    return Shown(b"".join(pieces).decode(encoding), width, code)


def _set_environment(patch: pytest.MonkeyPatch, changes: Mapping[str, str]) -> None:
    for name in ("COLUMNS", "NO_COLOR", "LC_ALL"):
        patch.delenv(name, raising=False)
    patch.setenv("TERM", "xterm-256color")
    for name, value in changes.items():
        patch.setenv(name, value)


def _read(terminal: int) -> Iterator[bytes]:
    # EIO: the other end is closed.
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 65536):
            yield piece


@dataclass
class Session:
    """A process with a terminal of its own, whose keys can be pressed."""

    number: int
    """Of the process."""
    ended: Callable[[], int | None]
    """Its exit code, None as long as it lives."""
    terminal: int
    width: int
    sent: str = ""
    _undecoded: bytes = field(default=b"", repr=False)

    def wait_for(self, words: str, times: int = 1) -> None:
        """Wait until the process has shown `words` so many times."""
        self.wait(lambda: self.sent.count(words) >= times, words)

    def type(self, line: str) -> None:
        """Type a line and press Enter."""
        os.write(self.terminal, f"{line}\n".encode())

    def press(self, key: str) -> None:
        """Press Ctrl and a letter."""
        os.write(self.terminal, bytes([ord(key.upper()) - ord("A") + 1]))

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        os.kill(self.number, number)

    def resize(self, width: int) -> None:
        """Make the window wider or narrower."""
        self.width = width
        resize(self.terminal, width)

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self.terminal)
        self.terminal = -1

    def end(self) -> Shown:
        """Wait for the end of the process."""
        deadline = time.monotonic() + PATIENCE
        while (code := self.ended()) is None:
            self._listen(deadline, "its end")
        while self.terminal >= 0 and select.select([self.terminal], [], [], 0)[0]:
            if not self._take():
                break
        return Shown(self.sent, self.width, code)

    def wait(self, happened: Callable[[], bool], what: str) -> None:
        """Wait until something has happened."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.ended() is None, f"it ended before {what!r}: {self.sent}"
            self._listen(deadline, what)

    def _listen(self, deadline: float, what: str) -> None:
        assert time.monotonic() < deadline, f"waited in vain for {what!r}: {self.sent}"
        hears = self.terminal >= 0 and select.select([self.terminal], [], [], 0.05)[0]
        if not hears or not self._take():
            time.sleep(0.01)

    def _take(self) -> bool:
        try:
            piece = os.read(self.terminal, 65536)
        except OSError:
            return False
        self._undecoded += piece
        text = self._undecoded.decode(errors="ignore")
        if text.encode() == self._undecoded:
            self.sent, self._undecoded = self.sent + text, b""
        return bool(piece)


def _without_size(variables: Mapping[str, str]) -> dict[str, str]:
    """Leave out what would be taken for the size of the terminal: pytest's processes have it."""
    return {name: value for name, value in variables.items() if name not in ("COLUMNS", "LINES")}


@dataclass(frozen=True)
class Typist:
    """A process that starts commands on terminals."""

    process: subprocess.Popen[bytes]

    @contextlib.contextmanager
    def open(self, width: int = 80, folder: Path | None = None, **what: Any) -> Iterator[Session]:
        """Start `arguments=[...]` or `code=...` with `changes={...}` of the environment."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        ours, theirs = pty.openpty()
        resize(theirs, width)
        changes = what.pop("changes", {})
        request = {
            "folder": str(folder or Path.cwd()),
            "terminal": os.ttyname(theirs),
            "environment": _without_size(environment(**{"TERM": "xterm-256color", **changes})),
            **what,
        }
        self.process.stdin.write(f"{json.dumps(request)}\n".encode())
        number = int(self.process.stdout.readline())
        codes: list[int] = []
        os.close(theirs)
        session = Session(number, lambda: self._end(codes), ours, width)
        try:
            yield session
        finally:
            if session.ended() is None:
                os.kill(number, signal.SIGKILL)
                session.end()
            if session.terminal >= 0:
                os.close(session.terminal)

    def _end(self, codes: list[int]) -> int | None:
        assert self.process.stdout is not None
        if not codes and select.select([self.process.stdout], [], [], 0)[0]:
            codes.append(int(self.process.stdout.readline()))
        return codes[0] if codes else None


@contextlib.contextmanager
def open_typist(*words: str) -> Iterator[Typist]:
    """Start such a process; with `torch` it has loaded what jobs need."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.terminal.forking", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What was read ahead would not be seen by `select`.
        bufsize=0,
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
    )
    try:
        yield Typist(process)
    finally:
        process.communicate(timeout=PATIENCE)
