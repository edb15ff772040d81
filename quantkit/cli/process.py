"""How the command's own process treats threads and memory; a library must not decide that."""

from __future__ import annotations

import ctypes
import os

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""

_MAPPED_FROM = 256 * 1024


def settle_process() -> None:
    """Choose how threads wait and how freed memory goes back, before torch is imported.

    Threads that wait for one another sleep instead of spinning: where something else uses the
    cores, a job with spinning threads takes tens of times as long. Larger blocks of memory are
    mapped one by one, so that freed tensors leave the process: glibc's own rule raises that bound
    while a program runs, and the peak of a job then grows by a fifth. Both can be set from outside
    by the usual variables, OMP_WAIT_POLICY and MALLOC_MMAP_THRESHOLD_.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)
