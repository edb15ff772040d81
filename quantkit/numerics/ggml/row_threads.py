"""Work on parts of a tensor at the same time, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Return the function's results, found in as many threads as torch takes for an operation.

    Within it torch takes one thread. Where an encoder is many short operations this is sooner than
    to share out each of them, the more so where others use the cores: threads that share an
    operation wait for the last of them every time.
    """
    items = list(items)
    threads = torch.get_num_threads()
    if min(threads, len(items)) < 2:
        return [function(item) for item in items]
    try:
        # Torch keeps the number by thread, and the last one set for threads to come.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
