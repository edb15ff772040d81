"""The real command: in a process of its own, or here, where torch is loaded already."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from quantkit.cli.main import main

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "quantkit"]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command that runs outside of the repository's folder, offline."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **changes}


def run(
    *arguments: str | Path,
    folder: Path | None = None,
    before: Callable[[], None] | None = None,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    """Run `quantkit` with `arguments` in `folder`; `before` is called in the new process first."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(**changes),
        preexec_fn=before,
        timeout=300,
    )


def run_here(
    *arguments: str | Path, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `quantkit` with `arguments` in `folder`, in this process: seconds faster than `run`.

    For what a command does and says; what it loads, and how it ends, is for `run`.
    """
    command = list(map(str, arguments))
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
