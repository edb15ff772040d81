"""How the command's own process treats threads and memory; a library must not decide that."""

from __future__ import annotations

import ctypes
import os

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""

_MAPPED_FROM = 2 * 1024 * 1024

_SPINS = "20000"


def settle_process() -> None:
    """Choose how threads wait and how freed memory goes back, before torch is imported.

    A thread that waits for another spins for microseconds and then sleeps. By its own rule OpenMP
    spins on for milliseconds, and where something else uses the cores a job then takes tens of
    times as long. Large blocks of memory are mapped one by one, so that freed tensors leave the
    process at once: glibc's own rule raises that bound while a program runs. torch asks for huge
    pages for them, or Linux would hand out every 4 KiB on its own. All can be set from outside by
    the usual variables: OMP_WAIT_POLICY or GOMP_SPINCOUNT, MALLOC_MMAP_THRESHOLD_, and
    THP_MEM_ALLOC_ENABLE.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)
