"""Asking ONNX Runtime, in a process of its own, whether it takes a file.

A graph is somebody else's: it can end the process that loads it, or never let go of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from quantkit.formats.onnx.container import OnnxFile
from quantkit.formats.onnx.wiring import show
from quantkit.masking import without_secrets

PROVIDER = "CPUExecutionProvider"
SECONDS = 300
"""Time that a graph has to be loaded in."""
_MAX_ANSWER = 1 << 20
_TRIAL = Path(__file__).with_name("trial.py")


@dataclass(frozen=True)
class Trial:
    """What came of each step: `checker`, `session`, `kernels` where there is no session, `genai`.

    errors: step -> what was wrong, empty for nothing. died: the step in which the process ended,
    and how; None where it did not.
    """

    errors: Mapping[str, Sequence[str]]
    died: tuple[str, str] | None

    @property
    def loads(self) -> bool:
        """Whether a session was created."""
        return self.errors.get("session") == []


def try_loading(file: OnnxFile, genai: Path | None, seconds: float = SECONDS) -> Trial:
    """Check a graph and load it in ONNX Runtime.

    Args:
        file: an opened graph: its data files are known to be inside of its folder.
        genai: a folder to load in onnxruntime-genai as well, or None.
        seconds: time after which the process is ended.
    """
    asked = {
        "path": str(file.path.absolute()),
        "provider": PROVIDER,
        "bytes": sum(tensor.size for tensor in file.tensors.values()),
        "genai": None if genai is None else str(genai.absolute()),
    }
    # -P: the script's folder has modules whose names are not its business.
    command = [sys.executable, "-P", str(_TRIAL), json.dumps(asked)]
    with tempfile.TemporaryFile() as answers:
        how = _run(command, answers, seconds)
        answers.seek(0)
        lines = answers.read(_MAX_ANSWER).decode("utf-8", "replace").splitlines()
    errors: dict[str, Sequence[str]] = {}
    step = "start"
    for line in lines:
        answer = _parse(line)
        if "errors" in answer:
            errors[step] = [shorten_error(str(error)) for error in answer["errors"]]
        elif "step" in answer:
            step = str(answer["step"])
    return Trial(errors, None if how is None else (step, how))


def _run(command: Sequence[str], answers: IO[bytes], seconds: float) -> str | None:
    """Run the trial; return how it ended, or None where it ended well."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=answers,
        stderr=subprocess.DEVNULL,
        env=without_secrets(os.environ),
        # A group of its own, so that nothing is left of it.
        start_new_session=True,
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"was not done after {seconds:g} seconds"
    finally:
        if process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
    if code < 0:
        return f"was ended by signal {-code}"
    return f"ended with exit code {code}" if code else None


def _parse(line: str) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def shorten_error(text: str) -> str:
    """Return what a library said as one line."""
    return show(" ".join(text.split()))
