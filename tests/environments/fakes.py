"""Environments that look like those that an install has made, and are not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from quantkit.environments.places import STAMP, digest_pins


def make_environment(runtime: str, *, stamped: bool = True, python: str | None = None) -> Path:
    """Make a folder with an interpreter and a stamp where `runtime` would be installed."""
    folder = Path(os.environ["QUANTKIT_RUNTIMES"]) / runtime
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("made by a test\n")
    (folder / "bin" / "python").symlink_to(python or sys.executable)
    if stamped:
        stamp = {"runtime": runtime, "build": "cpu", "pins": digest_pins(runtime, "cpu")}
        (folder / STAMP).write_text(json.dumps(stamp))
    return folder


def make_interpreter(path: Path, script: str) -> Path:
    """Write a shell script that stands in for an interpreter."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path
