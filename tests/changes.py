"""Hears every call by which a process changes a folder, just before it is made."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "fcntl.flock"}


def act_before_changes(acts: Mapping[int, Callable[[], None]]) -> Callable[[], int]:
    """Count the calls that open for writing, rename, remove, make, lock or sync; act before some.

    Cannot be undone: for a process of its own.

    Args:
        acts: number of a call, from 1 -> what is done just before it is made.

    Returns:
        What tells how many there were.
    """
    numbers, last = itertools.count(1), [0]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and (arguments[2] or 0) & _WRITES
        exchanged = event == "ctypes.dlsym" and arguments[1] == "renameat2"
        if opened or exchanged or event in _CHANGES:
            count()

    def count() -> None:
        last[0] = next(numbers)
        if last[0] in acts:
            acts[last[0]]()

    fsync = os.fsync

    def sync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    os.fsync = sync
    sys.addaudithook(hear)
    return lambda: last[0]


def die() -> None:
    """End this process by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
