"""A place in a file's header that moves forward and never believes a length that does not fit."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CheckpointError, unreadable
from quantkit.formats.gguf.header import (
    ARRAY,
    KIND_IDS,
    NUMBERS,
    STRING,
    Array,
    MetadataValue,
    Value,
)

MAX_HEADER_BYTES = 1 << 27
"""The largest vocabularies of today take a tenth of it."""

_KINDS = {number: kind for kind, number in KIND_IDS.items()}


@contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file for reading; yield it and its size.

    Raises:
        CheckpointError: it is missing, not a file, or cannot be read.
    """
    try:
        # A pipe in the place of a file would block for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as handle:
            yield handle, os.fstat(handle.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise unreadable(path, error) from error


class Cursor:
    """Reads little-endian values one behind the other.

    Attributes:
        path: of the file, for messages.
        position: bytes that have been read.
    """

    def __init__(
        self, path: Path, handle: BufferedReader, size: int, limit: int = MAX_HEADER_BYTES
    ) -> None:
        self.path = path
        self.position = 0
        self._handle = handle
        self._size = size
        self._end = min(size, limit)

    @property
    def left(self) -> int:
        """Bytes that may still be read."""
        return self._end - self.position

    def fault(self, words: str, at: int | None = None) -> CheckpointError:
        """Return the error that says what is wrong at a byte, by default the one reached."""
        place = self.position if at is None else at
        return CheckpointError(
            f"{self.path} is damaged at byte {place}: {words}; download or write it again"
        )

    def take(self, size: int, what: str) -> bytes:
        """Read `size` bytes.

        Raises:
            CheckpointError: there are not so many.
        """
        if size > self.left:
            if self.position + size <= self._size:
                raise self.fault(f"{what} goes beyond the {self._end} bytes that are read")
            raise self.fault(f"{what} takes {size} bytes, {self.left} are left")
        data = self._handle.read(size)
        if len(data) != size:
            raise CheckpointError(f"{self.path} became shorter while it was read")
        self.position += size
        return data

    def read_number(self, kind: str, what: str) -> int:
        """Read one whole number of a kind of `NUMBERS`."""
        return int(np.frombuffer(self.take(NUMBERS[kind].itemsize, what), NUMBERS[kind])[0])

    def read_count(self, smallest: int, what: str) -> int:
        """Read the number of things of which each takes at least `smallest` bytes."""
        at = self.position
        count = self.read_number("uint64", f"the number of {what}")
        if count * smallest > self.left:
            raise self.fault(f"{count} {what} are claimed, {self.left} bytes are left", at)
        return count

    def read_string(self, what: str) -> str:
        """Read a string; bytes that are not UTF-8 become lone surrogates."""
        size = int.from_bytes(self.take(8, what), "little")
        return self.take(size, what).decode("utf-8", "surrogateescape")

    def read_name(self, what: str) -> str:
        """Read a string that names something."""
        at = self.position
        name = self.read_string(what)
        if not name or "\0" in name or not name.isprintable():
            raise self.fault(f"{what} is {name[:80]!r}, which is no name", at)
        return name

    def read_value(self, what: str) -> MetadataValue:
        """Read the kind of a metadata value and the value."""
        kind = self._read_kind(what)
        if kind == STRING:
            return Value(kind, self.read_string(what))
        if kind != ARRAY:
            return Value(kind, self.read_numbers(kind, 1, what).item())
        kind = self._read_kind(what)
        if kind == ARRAY:
            raise self.fault(f"{what} is an array of arrays, which llama.cpp refuses")
        smallest = 8 if kind == STRING else NUMBERS[kind].itemsize
        count = self.read_count(smallest, f"items of {what}")
        if kind == STRING:
            return Array(kind, tuple(self.read_string(what) for _ in range(count)))
        return Array(kind, self.read_numbers(kind, count, what))

    def read_numbers(self, kind: str, count: int, what: str) -> NDArray[np.generic]:
        """Read numbers of a kind of `NUMBERS`."""
        dtype = NUMBERS[kind]
        data = self.take(count * dtype.itemsize, what)
        # Any byte but 0 is true to C++; numpy would keep the byte.
        return np.frombuffer(data, "u1") != 0 if kind == "bool" else np.frombuffer(data, dtype)

    def _read_kind(self, what: str) -> str:
        at = self.position
        number = self.read_number("uint32", what)
        if number not in _KINDS:
            raise self.fault(f"{what} has the kind {number}, which is not known", at)
        return _KINDS[number]
