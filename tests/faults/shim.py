"""Builds the shim of shim.c, arms it in this process, and reads what it has heard."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

KINDS = (
    "read",
    "create",
    "write",
    "sync",
    "rename",
    "mkdir",
    "remove",
    "truncate",
    "lock",
    "map",
    "link",
)
"""In the order of shim.c. `read` opens a file or folder without changing it."""

ACTIONS = {"count": 0, "kill": 1, "tear": 2, "fail": 3}


@dataclass(frozen=True)
class Fault:
    """What the shim does to which call."""

    root: str
    """Folder whose calls are numbered; a real path."""
    log: str
    """File that the calls are written to; outside of the folder."""
    at: int = 0
    """Number of the call, from 1; 0: none."""
    action: str = "count"
    error: int = 0
    """errno of a call that fails."""
    after: tuple[str, ...] = ()
    """Kinds of calls that all fail after it."""

    def request(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Call:
    """One line of the log: a call that was about to be made."""

    number: int
    kind: str
    bytes: int
    path: str
    other: str
    """The new name of what is renamed or linked."""


def build_shim(folder: Path) -> Path:
    """Compile the shim into `folder`; the test is skipped, loudly, where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("NOT TESTED, there is no C compiler (cc) for the shim that breaks calls")
    library, source = folder / "shim.so", Path(__file__).with_name("shim.c")
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    built = subprocess.run([*command, str(source), "-ldl"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return library


def arm(fault: Mapping[str, Any]) -> None:
    """Let the shim begin in this process, which was started with it in LD_PRELOAD."""
    after = sum(1 << KINDS.index(kind) for kind in fault["after"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    log = os.open(fault["log"], flags, 0o644)
    ctypes.CDLL(None).faults_arm(
        os.fsencode(fault["root"]),
        ctypes.c_long(fault["at"]),
        ACTIONS[fault["action"]],
        fault["error"],
        ctypes.c_uint(after),
        log,
    )


def read_calls(log: Path) -> list[Call]:
    """Return the calls that a run was about to make, in order."""
    calls = []
    for line in log.read_text(errors="surrogateescape").splitlines():
        number, kind, size, path, other = line.split("\t")
        calls.append(Call(int(number), kind, int(size), path, other))
    return sorted(calls, key=lambda call: call.number)


def written_bytes(calls: Sequence[Call]) -> dict[str, int]:
    """Return how many bytes the calls have written into each file that is left by them.

    What is not in it was made by nobody whom the shim hears.
    """
    found: dict[str, int] = {}
    for call in calls:
        if call.kind in ("create", "write", "map", "truncate"):
            found[call.path] = found.get(call.path, 0) + (
                call.bytes if call.kind in ("write", "map") else 0
            )
        elif call.kind == "rename":
            moved = {path for path in found if f"{path}/".startswith(f"{call.path}/")}
            for path in sorted(moved):
                found[call.other + path.removeprefix(call.path)] = found.pop(path)
        elif call.kind == "link" and call.path in found:
            found[call.other] = found[call.path]
    return found
