"""The loop of a sweep: start jobs while there is room, see how far they are, take what they say."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from quantkit.records import Event, Progress
from quantkit.sweeping.records import Ended, Running, SweepJob

SWEEP = "sweep"
"""Stage of the events that tell of a job's start and end; any other stage is a job's name."""

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_STOP = 15.0
"""A job stops within two seconds where the machine is not crowded."""
_TAIL_BYTES = 4096
_STEP = re.compile(r"^(\S+) (\d+)/(\d+)(?:  (.*))?$")
"""A line of progress as `quantize` writes it where there is no terminal."""

Start = Callable[[SweepJob, int], Running]
"""(job, slot from 0) -> the started job."""


def run_jobs(
    jobs: Sequence[SweepJob],
    start: Start,
    slots: int,
    ended: Callable[[SweepJob, Ended], bool],
    tell: Progress,
) -> None:
    """Run all jobs, `slots` at once, in their order.

    Args:
        ended: takes what ended and says whether further jobs are started.

    Raises:
        KeyboardInterrupt and whatever else ends this: no job is left running then.
    """
    waiting = deque(jobs)
    running: dict[int, tuple[SweepJob, Running]] = {}
    with _hanging_up_as_interrupt():
        try:
            while waiting or running:
                free = [slot for slot in range(slots) if slot not in running]
                for slot in free[: len(waiting)]:
                    job = waiting.popleft()
                    running[slot] = (job, start(job, slot))
                for slot, (job, process) in list(running.items()):
                    found = process.poll()
                    if found is None:
                        _tell_step(job, tell)
                        continue
                    del running[slot]
                    if not ended(job, found):
                        waiting.clear()
                if running:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException:
            _stop([process for _, process in running.values()])
            raise


@contextmanager
def _hanging_up_as_interrupt() -> Iterator[None]:
    """Let a terminal that is closed stop the jobs too, which are in groups of their own.

    Under `nohup` the signal is ignored, and stays so.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGHUP, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _stop(running: Sequence[Running]) -> None:
    """Let jobs end so that they can go on; those that do not, and all on a second Ctrl-C, die."""
    left = list(running)
    try:
        for process in left:
            process.stop()
        deadline = time.monotonic() + _SECONDS_TO_STOP
        while left and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            left = [process for process in left if process.poll() is None]
    finally:
        for process in left:
            process.kill()


def _tell_step(job: SweepJob, tell: Progress) -> None:
    found = read_step(job.log)
    if found is not None:
        stage, done, total, message = found
        tell(Event(job.name, done, total, f"{stage}  {message}".rstrip()))


def read_step(log: Path) -> tuple[str, int, int, str] | None:
    """Return stage, done, total and message of the last step in a job's log; None without."""
    try:
        with log.open("rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - _TAIL_BYTES))
            lines = handle.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if line.startswith("$ "):
            return None  # of an earlier run
        step = _STEP.match(line)
        if step:
            return step[1], int(step[2]), int(step[3]), step[4] or ""
    return None
