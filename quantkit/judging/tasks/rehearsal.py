"""Lets a process of its own do first what a file from elsewhere could make endless or huge.

A task's templates are programs, and so are the expressions that it looks for in answers. lm-eval
bounds neither their time nor their memory: loops within loops never end, a text in which each
letter is replaced by all of it fills any memory, and some expressions go over a text again and
again. So a forked process does the same work before; where nothing stopped it, it is done here.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

from quantkit.errors import InputError
from quantkit.signals import signals_held

MOST_BYTES = 4 << 30
"""That the work may take besides what its data justifies."""
_PAUSE = 0.02
"""Seconds between two looks at the process."""

Allow = Callable[[float], None]
"""Allows so many seconds of processor time from now on."""


def rehearse(
    what: str, work: Callable[[Allow], object], seconds: float, data_bytes: int = 0
) -> None:
    """Do `work` in a forked process; its failures are left to who does it again.

    Memory is bounded on Linux only.

    Args:
        what: begins the message of a refusal.
        work: is handed what allows it other time, when it knows how much there is to do.
        seconds: of processor time that it may take at first.
        data_bytes: that it may take besides `MOST_BYTES`.

    Raises:
        InputError: the work takes too much time or memory.
    """
    if not hasattr(os, "fork"):
        return
    most = _held_bytes(os.getpid()) + MOST_BYTES + data_bytes
    number, status = 0, None
    try:
        with signals_held(), warnings.catch_warnings():
            # Python warns of locks that other threads may hold; the child does this work alone.
            warnings.simplefilter("ignore", DeprecationWarning)
            number = os.fork()
            if not number:
                try:
                    _do(work, seconds)
                finally:
                    os._exit(1)
        status = _wait(number, most)
    finally:
        # It is still at work where it took too much, and after Ctrl-C.
        if number and status is None:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
    if status != 0:
        raise InputError(
            f"{what}: takes far more time or memory than its documents justify, and was stopped: "
            f"look for loops and repetitions in its templates, its filters and its data"
        )


def _do(work: Callable[[Allow], object], seconds: float) -> None:
    """What the child does: the work, without a word, until the kernel ends it."""
    for name in ("SIGPROF", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    # A terminal sends these to the parent too, which ends the child.
    for name in ("SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.disable()

    def allow(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)

    allow(seconds)
    with suppress(InputError), redirect_stdout(io.StringIO()):
        work(allow)
    os._exit(0)


def _wait(number: int, most: int) -> int | None:
    """Return how a process ended; None: it holds more than `most` bytes."""
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return status
        if _held_bytes(number) > most:
            return None
        time.sleep(_PAUSE)


def _held_bytes(number: int) -> int:
    """Return the bytes that a process holds, files that it has mapped left out; 0: not known."""
    try:
        lines = Path(f"/proc/{number}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    # A process that has just ended holds nothing.
    held = next((line.split()[1] for line in lines if line.startswith("RssAnon:")), "0")
    return int(held) << 10
