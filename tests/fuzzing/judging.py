"""Reads one case and judges it: the right result, one clear refusal, or a finding."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from tests.fuzzing.reader import Reader

MOST_BYTES = 500 << 20
"""By which a case may make the process larger."""
_LONGEST_LINE = 2000
"""Characters of a line that people can still read."""

ACCEPTED, REFUSED, CRASH, HANG, MEMORY = "accepted", "refused", "crash", "hang", "memory"

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2}
"""Audit event of a change to a folder -> how many of its arguments are paths."""
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
_STARTS |= {"os.forkpty", "socket.connect", "socket.getaddrinfo", "webbrowser.open"}


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    case: int
    kind: str
    seconds: float = 0.0
    """Of processor time."""
    growth: int = 0
    """Bytes that the process grew by while the case was read, at most."""
    words: str = ""
    """The refusal, or what is wrong."""


def judge(reader: Reader, number: int, place: Path, heard: list[str]) -> Outcome:
    """Read the case in `place / "input"`.

    Args:
        place: the folder of the case, in which nothing but `input`, `temp` and `work` are.
        heard: what `listen` has heard, which is emptied.
    """
    before = _list(place / "input")
    base = _restart_peak()
    heard.clear()
    begun = time.process_time()
    kind, words = _read(reader, place / "input")
    seconds = time.process_time() - begun
    growth = max(0, _read_memory("VmHWM") - base)
    left = [str(path.relative_to(place)) for path in (place / "temp").rglob("*")]
    if heard:
        kind, words = CRASH, f"it did what it must not: {'; '.join(heard[:5])}"
    elif left:
        kind, words = CRASH, f"it left files behind: {left[:5]}"
    elif _list(place / "input") != before:
        kind, words = CRASH, "it changed the files that it read"
    elif growth > MOST_BYTES and kind in (ACCEPTED, REFUSED):
        kind, words = MEMORY, f"it took {growth >> 20} MB, and then: {words}"
    return Outcome(number, kind, seconds, growth, words)


def listen(place: Path, starts: frozenset[str]) -> list[str]:
    """Hear what this process changes outside of `place`, starts or connects to, from now on.

    Cannot be undone: for a process of its own.

    Args:
        place: the folder in which cases lie, with all links resolved.
        starts: audit events that are not told.

    Returns:
        What was heard, one line each; whoever reads it empties it.
    """
    heard: list[str] = []
    inside = f"{place}{os.sep}"

    def tell(event: str, path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(inside) and name != os.devnull:
            heard.append(f"{event} {name}")

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if (arguments[2] or 0) & _WRITES:
                tell(event, arguments[0])
        elif event in _CHANGES:
            # What is relative to an open folder is told of that folder when it is opened.
            if all(type(each) is not int or each < 0 for each in arguments):
                for path in arguments[: _CHANGES[event]]:
                    tell(event, path)
        elif event in _STARTS - starts:
            heard.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hear)
    return heard


def prepare_place(place: Path, make: Callable[[Path], None]) -> None:
    """Make the folder of a case, have its files made, and make it the one that is worked in."""
    shutil.rmtree(place, ignore_errors=True)
    for name in ("temp", "work"):
        (place / name).mkdir(parents=True)
    make(place / "input")
    os.chdir(place)
    os.environ["TMPDIR"] = tempfile.tempdir = str(place / "temp")


def _read(reader: Reader, folder: Path) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="quantkit")
            reader.read(folder)
    except QuantkitError as error:
        fault = _find_fault(error, reader)
        words = f"{type(error).__name__}: {error}"[:1000]
        return (CRASH, f"{fault}: {words}") if fault else (REFUSED, words)
    # Whatever else comes out is a finding, an exit of the process too.
    except BaseException:
        return CRASH, traceback.format_exc(limit=-12)[-4000:]
    return ACCEPTED, ""


def _find_fault(error: QuantkitError, reader: Reader) -> str | None:
    """What is wrong with a refusal, of which people read the words."""
    text = str(error)
    if error.exit_code not in reader.exit_codes:
        return f"a refusal with the exit code {error.exit_code}"
    if not text.strip():
        return "a refusal without words"
    if max(map(len, text.splitlines())) > _LONGEST_LINE:
        return "a refusal that is too long to be read"
    if not all(letter.isprintable() or letter == "\n" for letter in text):
        return "a refusal that moves the cursor or cannot be printed"
    return None


def _list(folder: Path) -> list[tuple[str, int, int]]:
    found = ((path, path.lstat()) for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


def _restart_peak() -> int:
    """Have the kernel forget the most memory that was held; return what is held."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _read_memory("VmHWM")


def _read_memory(key: str) -> int:
    """A line of the process's status, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10
