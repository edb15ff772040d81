"""How the command's own process treats threads and memory; a library must not decide that."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from typing import TypeVar

from quantkit import collector_at_rest

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""

_MAPPED_FROM = 8 * 1024 * 1024
"""Hidden states of a micro-batch are smaller, what lies within a feed-forward is mostly larger."""

_KEPT_BEHIND = 128 * 1024 * 1024
"""Freed memory behind the last block in use; all of it is given back after each decoder block."""

_MAPPED_FROM_WITH_A_LIMIT = 16 * 1024 * 1024
"""Weights and their second moments are larger; what a micro-batch brings of a layer is smaller."""

_KEPT_SHAPES = "16"

_SPINS = "20000"

Loaded = TypeVar("Loaded")


def settle_process() -> None:
    """Choose how threads wait and how freed memory goes back, before torch is imported.

    A thread that waits for another spins for microseconds and then sleeps. By its own rule OpenMP
    spins on for milliseconds, and where something else uses the cores a job then takes tens of
    times as long. Large blocks of memory are mapped one by one, so that freed tensors leave the
    process at once: glibc's own rule raises that bound while a program runs. torch asks for huge
    pages for them, or Linux would hand out every 4 KiB on its own. Of smaller ones some are kept
    for the next, for the same reason. All can be set from outside by the usual variables:
    OMP_WAIT_POLICY or GOMP_SPINCOUNT, MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, and
    THP_MEM_ALLOC_ENABLE.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _set_malloc(_MMAP_THRESHOLD, _MAPPED_FROM, "MALLOC_MMAP_THRESHOLD_")
    _set_malloc(_TRIM_THRESHOLD, _KEPT_BEHIND, "MALLOC_TRIM_THRESHOLD_")


def settle_for_a_limit() -> None:
    """Choose, for a job with a limit of memory, what is kept for the next use.

    The tensors of a micro-batch take the memory of the last one's again: pages that are new each
    time cost a tenth of the time, and what waits is parked in a file, or counted with the holes
    that it leaves between what is freed. oneDNN keeps the code for a product's shape, a megabyte
    at times, and by its own rule that of a thousand shapes; a forward needs few, and the many of
    the solvers come back too seldom.
    """
    _set_malloc(_MMAP_THRESHOLD, _MAPPED_FROM_WITH_A_LIMIT, "MALLOC_MMAP_THRESHOLD_")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KEPT_SHAPES)


def load_for_good(load: Callable[[], Loaded]) -> Loaded:
    """Return what is loaded, with hundreds of modules behind it, and never look at them again.

    What they are made of stays until the process ends. Else the garbage collector would go over it
    four times in the first seconds of a job, a tenth of the time that the smallest take.
    """
    with collector_at_rest():
        loaded = load()
        # Once: what is garbage by the next time is to be found.
        if not gc.get_freeze_count():
            gc.freeze()
    return loaded


def _set_malloc(parameter: int, size: int, variable: str) -> None:
    """Give glibc's allocator a bound in bytes, unless the user has given one by a variable."""
    if variable in os.environ:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(parameter, size)
