"""A job as a process of its own on this machine, with its share of cores and GPUs."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from quantkit.errors import writing
from quantkit.sweeping.records import Ended, SweepJob


class LocalJob:
    """A `Running` that is a process of this machine."""

    def __init__(self, job: SweepJob, environment: Mapping[str, str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._started = time.monotonic()
        self._process = start_process(job.command, job.log, environment, self._said)

    def poll(self) -> Ended | None:
        """As `Running`."""
        code = self._process.poll()
        if code is None:
            return None
        with self._said:
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")
        return Ended(code, said, time.monotonic() - self._started)

    def stop(self) -> None:
        """As `Running`."""
        signal_group(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """As `Running`."""
        signal_group(self._process, signal.SIGKILL)


def start_process(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    said: IO[bytes],
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start `quantkit` with the arguments `command`.

    Args:
        log: gets what it writes to stderr, behind what earlier runs have written.
        said: gets what it writes to stdout.
        folder: to run in; by default that of this process.

    Raises:
        ResourceError, OutputError: the log cannot be written.
    """
    # Without -P, modules would be taken from the working folder, which may be a stranger's.
    line = [sys.executable, "-P", "-m", "quantkit", *command]
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as handle:
            handle.write(f"$ {shlex.join(['quantkit', *command])}\n".encode())
            handle.flush()
            return subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=handle,
                env=dict(environment),
                cwd=folder,
                # A group of its own: Ctrl-C reaches the sweep alone, which then stops its jobs.
                start_new_session=True,
            )


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process that has not ended, and to what it has started in its group."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def job_environment(
    environment: Mapping[str, str], slot: int, slots: int, gpus: Sequence[str]
) -> dict[str, str]:
    """Return `environment` for the job in `slot` of `slots` that run at once.

    Cores are divided evenly, unless OMP_NUM_THREADS is set. Of several GPUs each slot has one,
    which it shares only where there are more slots than GPUs.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them.
    """
    child = dict(environment)
    if slots > 1:
        child.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // slots)))
        if len(gpus) > 1:
            child["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return child


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def list_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the GPUs that a process with `environment` may use, without importing torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(filter(None, map(str.strip, visible.split(","))))
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return tuple(map(str, range(len(found))))
