"""What a reader could do that it must not is found, named, and survived."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.errors import InputError, ResourceError
from tests.fuzzing import running
from tests.fuzzing.reader import Reader, make_case
from tests.fuzzing.running import Outcome, run_cases

KEPT: list[object] = []


def refuse(words: str) -> None:
    raise InputError(words)


def give_up() -> None:
    raise ResourceError("too large")


def spin() -> None:
    while True:
        pass


def take_memory() -> None:
    KEPT.append(b"x" * (600 << 20))


def warn() -> None:
    warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="quantkit.x")


DEEDS: dict[str, tuple[Callable[[], object], str, str]] = {
    "nothing": (lambda: None, "accepted", ""),
    "refusal": (lambda: refuse("line 1 is wrong"), "refused", "line 1 is wrong"),
    "another code": (give_up, "crash", "exit code 5"),
    "no words": (lambda: refuse(""), "crash", "without words"),
    "exception": (lambda: {}["key"], "crash", "KeyError"),
    "exit": (lambda: sys.exit(2), "crash", "SystemExit"),
    "warning": (warn, "crash", "UserWarning: ours"),
    "fault": (lambda: ctypes.string_at(0), "crash", "SIGSEGV"),
    "end": (lambda: os._exit(0), "crash", "exit code 0"),
    "loop": (spin, "hang", "seconds of processor time"),
    "wait": (signal.pause, "hang", "did not end"),
    "memory": (take_memory, "memory", "600 MB"),
    "addresses": (lambda: bytearray(4 << 30), "crash", "MemoryError"),
    "outside": (lambda: Path("../../outside").write_text("x"), "crash", "outside"),
    "renamed": (lambda: os.rename("input/what", "../what"), "crash", "os.rename"),
    "left": (lambda: tempfile.mkstemp(), "crash", "left files behind"),
    "changed": (lambda: Path("input/what").write_text("y"), "crash", "changed the files"),
    "worked": (lambda: Path("work/x").write_text("x"), "accepted", ""),
    "process": (lambda: subprocess.run(["true"], check=True), "crash", "subprocess.Popen"),
    "system": (lambda: os.system("true"), "crash", "os.system"),
    "network": (lambda: socket.create_connection(("127.0.0.1", 9)), "crash", "socket"),
    "last": (lambda: None, "accepted", ""),
}


def run_deeds(names: list[str], place: Path) -> list[Outcome]:
    def write(number: int, folder: Path) -> None:
        folder.mkdir()
        (folder / "what").write_text(names[number])

    def do(folder: Path) -> None:
        DEEDS[(folder / "what").read_text()][0]()

    reader = Reader("deeds", build=lambda folder: None, damages={}, read=do)
    return run_cases(reader, range(len(names)), write, place)


def check_deeds(names: list[str], outcomes: list[Outcome]) -> None:
    assert [outcome.case for outcome in outcomes] == list(range(len(names)))
    for name, outcome in zip(names, outcomes, strict=True):
        _, kind, words = DEEDS[name]
        assert (name, outcome.kind) == (name, kind), outcome.words
        assert words in outcome.words


def test_deeds_are_found(tmp_path: Path) -> None:
    """Each by its number, in a batch that goes on behind it."""
    names = [name for name in DEEDS if name not in ("loop", "wait")]

    check_deeds(names, run_deeds(names, tmp_path / "cases"))


def test_a_loop_is_ended_by_its_processor_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes on a busy machine."""
    monkeypatch.setattr(running, "MOST_SECONDS", 0.3)
    names = ["nothing", "loop", "last"]

    check_deeds(names, run_deeds(names, tmp_path / "cases"))


def test_what_waits_for_ever_is_ended_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no processor time."""
    monkeypatch.setattr(running, "_WAIT_SECONDS", 1)

    check_deeds(["wait"], run_deeds(["wait"], tmp_path / "cases"))


def test_a_case_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    """It depends on the name and the number alone, not on the cases before it."""

    def build(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "file").write_bytes(bytes(range(100)))

    def noise(draw: object, content: bytes) -> bytes:
        return repr(draw.random()).encode() + content  # type: ignore[attr-defined]

    reader = Reader("some", build, {"file": (noise,)}, read=lambda folder: None)
    (tmp_path / "samples").mkdir()
    build(tmp_path / "samples")
    made = []
    for attempt, numbers in enumerate([(0, 1, 2), (2, 1, 0)]):
        for number in numbers:
            make_case(reader, number, tmp_path / "samples", tmp_path / f"{attempt}-{number}")
        made.append([(tmp_path / f"{attempt}-{n}" / "file").read_bytes() for n in range(3)])

    assert made[0] == made[1]
    assert len(set(made[0])) == 3
