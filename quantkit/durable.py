"""Files that appear whole or not at all: written beside, synced to disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from quantkit.errors import writing


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, sync it and rename it to `path`.

    Raises:
        ResourceError, OutputError: the file cannot be written; nothing is left of it.
    """
    beside = path.with_name(f"{path.name}.writing")
    try:
        with writing(path):
            write(beside)
            sync(beside)
            beside.replace(path)
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, as `write_atomically` does."""

    def write(beside: Path) -> None:
        beside.write_bytes(text.encode())

    write_atomically(path, write)


def sync(path: Path) -> None:
    """Ask the system to put a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
