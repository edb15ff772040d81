"""Share out a loop that lets go of Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from itertools import pairwise

import torch

_POOLS: dict[int, ThreadPoolExecutor] = {}
"""The one pool of this process, by the most threads that it starts: none before it needs them."""

_IS_WORKER: ContextVar[bool] = ContextVar("a thread of the pool", default=False)

if hasattr(os, "register_at_fork"):
    # A forked process has the pool, but none of its threads.
    os.register_at_fork(after_in_child=_POOLS.clear)


def share_out(
    run: Callable[[int, int], None], count: int, most_threads: int, parts_a_thread: int = 1
) -> None:
    """Call `run(start, stop)` for the parts of `count` things, on as many threads as torch has.

    Threads wait for the next call, and a part is done by who is free first. A call from one of
    them runs alone, so that none waits for what only it could do. The error of a part is raised
    when no part runs any more; it may leave others undone.

    Args:
        most_threads: that are worth waking.
        parts_a_thread: with several, a thread that wakes late or shares its core does fewer.
    """
    available = torch.get_num_threads()
    threads = 1 if _IS_WORKER.get() else min(available, most_threads, count)
    if threads < 2:
        run(0, count)
        return
    number = min(threads * parts_a_thread, count)
    # Its next part goes to the thread that asks first, and to no other.
    parts = iter(list(pairwise(count * part // number for part in range(number + 1))))

    def take_parts() -> None:
        for part in parts:
            run(*part)

    others: list[Future[None]] = []
    pool = _find_pool(available - 1)
    try:
        for _ in range(threads - 1):
            others.append(pool.submit(take_parts))
        take_parts()
    finally:
        # Until they have ended they write to what is the caller's.
        begun = [other for other in others if not other.cancel()]
        for other in begun:
            other.exception()
    for other in begun:
        other.result()


def _find_pool(size: int) -> ThreadPoolExecutor:
    pool = _POOLS.get(size)
    if pool is None:
        # Who waits for the former one holds it; with nobody left its threads end.
        _POOLS.clear()
        made = ThreadPoolExecutor(size, "share", initializer=_IS_WORKER.set, initargs=(True,))
        pool = _POOLS.setdefault(size, made)
    return pool
