"""A worker that a test talks to by hand, in the protocol of the runtimes' workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.judging.evaluate import WORKERS


@contextmanager
def running_worker(
    runtime: str, workers: Mapping[str, Path] = WORKERS
) -> Iterator[subprocess.Popen[str]]:
    """Start the worker of a runtime, and stop it behind the block."""
    process = subprocess.Popen(
        [sys.executable, str(workers[runtime])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def say(process: subprocess.Popen[str], **request: object) -> dict[str, Any]:
    """Send one request and return the one line that comes back."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    assert isinstance(answer, dict)
    return answer


def load(process: subprocess.Popen[str], path: Path) -> dict[str, Any]:
    """Let the worker load a model on the CPU."""
    return say(process, op="load", path=str(path), device="cpu", threads=1)
