"""Signals that ask for an end, where a process forks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_HELD = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask for an end."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Let a signal that comes while the process forks be heard after it.

    What a handler raises within a fork is raised in a callback of a library, where Python drops it:
    Ctrl-C would do nothing. To block the signals would not do, as any other thread takes them too.
    """
    # Handlers run in the main thread alone: in none of the callbacks of another's fork.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _HELD}
    handlers = {number: found for number, found in before.items() if callable(found)}
    waiting: list[int] = []
    forking = True

    def hold(number: int, frame: FrameType | None) -> None:
        if forking:
            waiting.append(number)
        else:
            # One of the others has raised before this one was back in its place.
            handlers[signal.Signals(number)](number, frame)

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        forking = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
