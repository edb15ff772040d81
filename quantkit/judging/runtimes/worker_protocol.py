"""What all judging workers do alike: read requests, answer each, and say what went wrong.

Part of each worker, which runs under another interpreter than quantkit's: only the standard library
is imported here. transformers_worker.py describes the requests and answers.
"""

from __future__ import annotations

import errno
import gc
import importlib.metadata
import json
import os
import platform
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

Reply = dict[str, Any]

FAILURES: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    MemoryError,
)
"""The classes of bad files and lacking resources. Anything else is a defect: its traceback on
standard error and the exit code tell the parent."""


def serve(
    answer: Callable[[Reply], Reply],
    failures: tuple[type[Exception], ...],
    out_of_memory: str,
    packages: tuple[str, ...],
) -> int:
    """Answer the requests on standard input, one line of JSON each, until it ends or says `exit`.

    Every worker answers these by itself, before and after it has loaded a model:

        {"op": "versions"} -> {"ok": true, "versions": {...}}, without importing the runtime
        {"op": "usage"} -> {"ok": true, "memory_bytes": largest resident set so far, or null}

    and the answer to `load` has "load_seconds" besides what `answer` says.

    Args:
        answer: returns the reply to a request.
        failures: what `answer` may raise and the parent is told.
        out_of_memory: words of the runtime for what it could not get.
        packages: whose versions decide what is computed.
    """

    def respond(request: Reply) -> Reply:
        if request["op"] == "versions":
            return {"ok": True, "versions": find_versions(*packages)}
        if request["op"] == "usage":
            return {"ok": True, "memory_bytes": _peak_memory()}
        started = time.perf_counter()
        reply = answer(request)
        if request["op"] == "load":
            reply["load_seconds"] = time.perf_counter() - started
        return reply

    channel = _take_stdout()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = respond(request)
        except failures as error:
            kind = _kind(error, out_of_memory)
            reply = {"ok": False, "kind": kind, "error": _one_line(error)}
            reply["package"] = getattr(error, "name", None)
        channel.write(json.dumps(reply) + "\n")
        channel.flush()
        if request["op"] == "exit":
            break
    return 0


def find_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Look for no garbage while libraries are imported, nor ever at what they are made of.

    With torch and transformers that takes 0.4 s. What is loaded later is looked at as usual.
    """
    gc.disable()
    try:
        yield
        # Once: by the next time there is a model that may become garbage.
        if not gc.get_freeze_count():
            gc.freeze()
    finally:
        gc.enable()


def quicken_float32() -> None:
    """Let torch multiply float32 as quickly as it can with all digits; before a model computes."""
    here = os.path.dirname(os.path.abspath(__file__))
    # By its path, as the workers: another interpreter has no quantkit.
    found = runpy.run_path(os.path.join(here, "..", "..", "numerics", "onednn.py"))
    found["set_quick_float32"]()


def _peak_memory() -> int | None:
    """The largest resident set of this process, in bytes; None where it is not told."""
    try:
        import resource

        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    except ImportError:  # Windows has none
        return None
    except OSError:
        peaks = []
    if peaks:
        # What getrusage says on Linux has in it what the parent held when it started this process.
        return 1024 * int(peaks[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)


def _take_stdout() -> TextIO:
    """Keep standard output for the answers; whatever else prints goes to standard error."""
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "w", encoding="utf-8")


def _kind(error: Exception, out_of_memory: str) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "disk"
    # By name and by words: torch raises its own class on CUDA and a bare RuntimeError on a CPU.
    named = type(error).__name__ == "OutOfMemoryError" or out_of_memory in str(error)
    if isinstance(error, MemoryError) or named:
        return "memory"
    return "package" if isinstance(error, ImportError) else "other"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]
