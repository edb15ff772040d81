"""A process with the shim in it, which runs commands in children of its own and breaks them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.killing import ask, forking
from tests.faults.shim import Call, Fault, read_calls

LONGEST = 600.0
"""Seconds after which a command hangs; on an idle machine each takes one or two."""


@dataclass(frozen=True)
class Ran:
    """How a command ended, what it printed, and which calls it made."""

    status: int
    shown: str
    calls: Sequence[Call]


@dataclass(frozen=True)
class Runner:
    """The process, and the folder that its commands work in."""

    root: Path
    """Where the calls are counted; emptied before each run."""
    aside: Path
    """For what the harness itself writes."""
    process: subprocess.Popen[str]

    def run(self, arguments: Sequence[str], fault: Fault | None = None) -> Ran:
        """Run `quantkit` in a child, broken as `fault` says."""
        calls = self.aside / "calls.txt"
        fault = fault or Fault(str(self.root), str(calls))
        reply, shown = self._ask(arguments, kill_after=LONGEST, fault=fault.request())
        return Ran(reply["status"], shown, read_calls(calls))

    def warm(self, arguments: Sequence[str]) -> Ran:
        """Run it in the process itself, which has loaded everything afterwards."""
        reply, shown = self._ask(arguments, here=True)
        return Ran(reply["status"], shown, ())

    def _ask(self, arguments: Sequence[str], **how: object) -> tuple[dict[str, int], str]:
        log = self.aside / "log.txt"
        request = {"arguments": [*arguments], "folder": str(self.root), "log": str(log), **how}
        said = self.aside / "said.txt"
        return ask(self.process, said, request), (said if how.get("here") else log).read_text()


@contextmanager
def open_runner(shim: Path, folder: Path, changes: Mapping[str, str] = {}) -> Iterator[Runner]:
    """Start the process; temporary files and the baselines' store are in the root too."""
    root, aside = folder.resolve() / "root", folder.resolve() / "aside"
    root.mkdir()
    aside.mkdir()
    variables = {
        "LD_PRELOAD": str(shim),
        "TMPDIR": str(root / "tmp"),
        "QUANTKIT_CACHE": str(root / "cache"),
    }
    with forking(aside / "said.txt", **variables, **changes) as process:
        yield Runner(root, aside, process)
