"""Share out a loop that lets go of Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch


def share_out(run: Callable[[int, int], None], count: int, most_threads: int) -> None:
    """Call `run(start, stop)` for the parts of `count` things, on as many threads as torch has.

    Args:
        most_threads: that are worth starting.
    """
    threads = max(1, min(torch.get_num_threads(), most_threads))
    if threads == 1:
        run(0, count)
        return
    bounds = [count * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(run, *part) for part in pairwise(bounds[1:])]
        run(*bounds[:2])
    for other in others:
        other.result()
