"""Reading ahead: the next values are loaded by a thread while the present one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar, cast

K = TypeVar("K")
V = TypeVar("V")

_PATIENCE = 1.5
"""Seconds that a closed reader waits for its thread, which ends after the value it is at."""


def read_ahead(
    items: Sequence[K], load: Callable[[K], V], depth: int = 1
) -> Generator[V, None, None]:
    """Yield `load(item)` for every item, in order, the next `depth` of them loaded meanwhile.

    Whoever drops a value before asking for the next one has that one and `depth` more in memory.
    Close a reader that is not followed to its end: no thread and no value stays behind. (A load
    that takes longer than 1.5 seconds ends by itself a little later, and its value is dropped.)

    Args:
        load: runs in a thread of its own, where torch's modes (inference, no_grad) are not those
            of the caller. Plain reads of files let the caller compute meanwhile.
        depth: how many values to read ahead; 0 loads each one when it is asked for.

    Raises:
        Whatever `load` raises, where its value is asked for.
    """
    if depth == 0:
        yield from map(load, items)
        return
    values: SimpleQueue[tuple[V | None, BaseException | None]] = SimpleQueue()
    allowed, closed = Semaphore(depth + 1), Event()

    def run() -> None:
        for item in items:
            allowed.acquire()
            if closed.is_set() or not _put(values, load, item):
                return

    thread = Thread(target=run, name="reading ahead", daemon=True)
    thread.start()
    try:
        for number in range(len(items)):
            if number:
                # The value before this one has been dropped: one more may be begun.
                allowed.release()
            yield _take(values)
    finally:
        closed.set()
        allowed.release()
        thread.join(_PATIENCE)
        _drop(values)


def _put(
    values: SimpleQueue[tuple[V | None, BaseException | None]], load: Callable[[K], V], item: K
) -> bool:
    """Load one value, or keep the error for whoever asks; nothing stays in the thread."""
    try:
        values.put((load(item), None))
    except BaseException as error:
        values.put((None, error))
        return False
    return True


def _take(values: SimpleQueue[tuple[V | None, BaseException | None]]) -> V:
    value, error = values.get()
    if error is not None:
        raise error
    return cast(V, value)


def _drop(values: SimpleQueue[tuple[V | None, BaseException | None]]) -> None:
    try:
        while True:
            values.get_nowait()
    except Empty:
        pass
