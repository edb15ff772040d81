"""Float32 files that hold bfloat16 numbers, as those of models on a GPU do, in half of the bytes.

The lower two bytes of such a number are zero: nothing is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_CHUNK = 1 << 20
"""Numbers at a time."""


def are_halves(file: Path) -> bool:
    """Whether every number of a file of little-endian float32 is one of bfloat16.

    Raises:
        OSError: the file cannot be read.
    """
    return file.stat().st_size % 4 == 0 and all(
        not (numbers & 0xFFFF).any() for numbers in _read(file, "<u4")
    )


def write_halves(file: Path, halves: Path) -> None:
    """Write the upper two bytes of each number of `file` to `halves`, which must not exist.

    Raises:
        OSError: a file cannot be read or written.
    """
    with halves.open("xb") as handle:
        for numbers in _read(file, "<u4"):
            handle.write((numbers >> 16).astype("<u2").tobytes())


def read_halves(halves: Path, file: Path) -> tuple[int, str]:
    """Write the numbers of `halves` to `file` as float32; return size and sha256 of `halves`.

    Raises:
        OSError: a file cannot be read or written.
    """
    digest, size = hashlib.sha256(), 0
    with file.open("xb") as handle:
        for numbers in _read(halves, "<u2"):
            digest.update(numbers.tobytes())
            size += numbers.nbytes
            handle.write((numbers.astype("<u4") << 16).tobytes())
    # An odd byte at the end is no number.
    return size + halves.stat().st_size % 2, digest.hexdigest()


def _read(file: Path, kind: str) -> Iterator[np.ndarray]:
    with file.open("rb") as handle:
        while len(numbers := np.fromfile(handle, dtype=kind, count=_CHUNK)):
            yield numbers
