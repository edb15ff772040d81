"""Running pip and its like to their end, and saying in one line why they failed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import InputError, ResourceError
from quantkit.masking import clean_line

METADATA_SCRIPT = Path(__file__).with_name("wheel_metadata.py")

_NO_SPACE = ("No space left on device", "Disk quota exceeded")
_NO_INDEX = ("connection broken", "Name or service not known", "Network is unreachable")
_KEPT_LINES = 200
_WORDS = 400
_REASON = 160
_LED = frozenset({"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER"})
"""Variables that would lead Python or pip to other folders."""


@dataclass(frozen=True)
class Pip:
    """pip of a new environment: for which runtime, under which versions, whom it tells."""

    python: Path
    runtime: str
    constraints: Path
    tell: Callable[[str], None]


def run_pip(pip: Pip, command: str, *arguments: str) -> None:
    """Run `pip COMMAND`; raises as `run_program`."""
    options = ("--disable-pip-version-check", "--no-input", "--no-color")
    line = [str(pip.python), "-I", "-m", "pip", *options, command, *arguments]
    run_program(line, f"pip cannot install {pip.runtime}", pip.tell)


def ask_metadata(pip: Pip, what: str, *files: Path) -> list[str]:
    """Return the lines of wheel_metadata.py, which the environment's own pip understands."""
    said: list[str] = []
    command = [str(pip.python), "-I", str(METADATA_SCRIPT), what, *map(str, files)]
    run_program(command, f"cannot read the metadata of {pip.runtime}", said.append)
    return said


def run_program(command: Sequence[str], failure: str, tell: Callable[[str], None]) -> None:
    """Run a program to its end and tell each line that it says.

    Args:
        failure: what an error says first.

    Raises:
        InputError: it fails; with its last words.
        ResourceError: it found no space on the disk.
    """
    words: deque[str] = deque(maxlen=_KEPT_LINES)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={name: value for name, value in os.environ.items() if name not in _LED},
        text=True,
        errors="replace",
        # A group of its own: Ctrl-C reaches the parent alone, which then stops the group.
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in map(clean_line, process.stdout):
                if line:
                    words.append(line)
                    tell(line)
            process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise _explain(failure, words)


def _explain(failure: str, words: Sequence[str]) -> InputError | ResourceError:
    """Return the one line that says why a program failed, from what it said."""
    if any(mark in line for line in words for mark in _NO_SPACE):
        return ResourceError(f"{failure}: no space left on the disk (TMPDIR has the downloads)")
    if any("ensurepip" in line for line in words):
        return InputError(
            f"{failure}: {sys.executable} has no ensurepip; on Debian and Ubuntu: "
            "apt-get install python3-venv"
        )
    broken = [line for line in words if any(mark in line for mark in _NO_INDEX)]
    if broken:
        reason = broken[-1].partition("connection broken by ")[2] or broken[-1]
        return InputError(
            f"{failure}: the package index was not reached; check the network and pip's settings "
            f"({reason[:_REASON]})"
        )
    errors = [line for line in words if line.startswith("ERROR")]
    plain = [line for line in words if not line.startswith("WARNING")]
    last = " | ".join(errors or plain[-3:])[-_WORDS:] or "it said nothing"
    return InputError(f"{failure}: {last}")
