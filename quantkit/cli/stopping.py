"""Signals: each that asks for an end lets a command end as Ctrl-C does, nothing half-written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C, a batch system, and a terminal that is closed."""


@contextmanager
def stopping_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for every such signal, as often as it comes, until the end of this.

    A signal that is ignored stays so, as SIGHUP is under `nohup`.
    """
    with _handling(_interrupt):
        yield


@contextmanager
def unstoppable() -> Iterator[None]:
    """Let nothing come in between: for the moment in which the last words are written."""
    with _handling(signal.SIG_IGN):
        yield


def stop_at_once() -> None:
    """End the process by the next signal, without words: all is done, or nothing has begun."""
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handling(handler: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    # None: set by something that is not Python, which has its reasons.
    heard = [n for n, found in before.items() if found is not None and found != signal.SIG_IGN]
    try:
        for number in heard:
            signal.signal(number, handler)
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
