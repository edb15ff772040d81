"""The pages of a parquet file, walked before a library makes anything of them.

What the footer says of sizes is not binding for the pages, and a page of a kilobyte may hold a
gigabyte when it is unpacked: each page begins with a header that says how many bytes and values it
will have, which the library believes. Format: https://github.com/apache/parquet-format,
`parquet.thrift`; the headers are in Thrift's compact protocol.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantkit.varints import UnendingNumber, read_varint

_MAX_PAGES = 1 << 18
"""Of one file. Writers make pages of a megabyte or of 20,000 rows."""
_MAX_DEPTH = 8
"""Of structs in a header, of which the format has three."""

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_INTEGERS = frozenset({4, 5, 6})
"""Types of Thrift's compact protocol."""
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3
_DATA, _DICTIONARY, _DATA_V2 = 5, 7, 8
_ENCODING = {_DATA: 2, _DATA_V2: 4}
"""Fields of a page's header, and those of a data page's with the encoding; 1 counts its values."""
_REFERRING = frozenset({2, 8})
"""PLAIN_DICTIONARY and RLE_DICTIONARY."""


@dataclass(frozen=True)
class Page:
    """What the header of a page says of it."""

    start: int
    """Where it lies behind its header."""
    compressed: int
    uncompressed: int
    """Bytes."""
    values: int
    """Of a data page; 0 for others."""
    encoding: int
    """Of the values of a data page; -1 for others."""
    is_dictionary: bool
    levels: int | None = None
    """Bytes of the levels in front of the values; None: the values' page tells, or has none."""
    level_encodings: tuple[int, int] = (-1, -1)
    """Of both kinds of levels, where `levels` is None."""
    is_packed: bool = True
    """Whether the values are compressed, if its column is."""

    @property
    def refers(self) -> bool:
        """Whether its values are numbers of those in a dictionary."""
        return self.encoding in _REFERRING


class DamagedPages(ValueError):
    """The headers are not what the format says."""


def walk_pages(data: mmap.mmap, start: int, size: int) -> Iterator[Page]:
    """Yield the pages of one column chunk.

    Args:
        data: the file.
        start, size: where the chunk lies, in bytes.

    Raises:
        DamagedPages: a header is damaged, or a page reaches beyond the chunk.
    """
    place, end = start, start + size
    if start < 0 or size < 0 or end > len(data):
        raise DamagedPages("a column lies beyond the end of the file")
    for _ in range(_MAX_PAGES):
        if place >= end:
            return
        try:
            page, place = _read_header(data, place)
        except IndexError:
            raise DamagedPages("a page is cut short") from None
        except UnendingNumber:
            raise DamagedPages("a number in the header of a page does not end") from None
        sizes = page.compressed, page.uncompressed, page.values, page.levels or 0
        if min(sizes) < 0:
            raise DamagedPages("the size of a page is negative")
        if sizes[3] > min(sizes[:2]):
            raise DamagedPages("the levels of a page are longer than the page")
        place += page.compressed
        if place > end:
            raise DamagedPages("a page reaches beyond its column")
        yield page
    raise DamagedPages(f"a column has more than {_MAX_PAGES} pages")


def _read_header(data: mmap.mmap, place: int) -> tuple[Page, int]:
    """Return a page and the place behind its header."""
    numbers = {_UNCOMPRESSED_SIZE: 0, _COMPRESSED_SIZE: 0}
    field, is_dictionary = 0, False
    details: dict[str, Any] = {"values": 0, "encoding": -1}
    while True:
        field, kind, place = read_field(data, place, field)
        if not kind:
            sizes = numbers[_COMPRESSED_SIZE], numbers[_UNCOMPRESSED_SIZE]
            return Page(place, *sizes, is_dictionary=is_dictionary, **details), place
        if field in numbers and kind in _INTEGERS:
            numbers[field], place = _read_signed(data, place)
        elif field in _ENCODING and kind == _STRUCT:
            found = _read_numbers(data, place)
            if 1 not in found or _ENCODING[field] not in found:
                raise DamagedPages("the header of a page does not say how its values are stored")
            details = {"values": found[1], "encoding": found[_ENCODING[field]]}
            if field == _DATA:
                details["level_encodings"] = (found.get(3, -1), found.get(4, -1))
            else:
                details |= {
                    "levels": found.get(5, 0) + found.get(6, 0),
                    "is_packed": found.get(7) != _FALSE,
                }
            place = _skip(data, place, kind, 0)
        else:
            is_dictionary = is_dictionary or field == _DICTIONARY
            place = _skip(data, place, kind, 0)


def _read_numbers(data: mmap.mmap, place: int) -> dict[int, int]:
    """Return the integers of the struct at `place` by their fields; of a truth, its type."""
    found: dict[int, int] = {}
    field = 0
    while True:
        field, kind, place = read_field(data, place, field)
        if not kind:
            return found
        if kind in _INTEGERS:
            found[field], place = _read_signed(data, place)
        else:
            if kind in (_TRUE, _FALSE):
                found[field] = kind
            place = _skip(data, place, kind, 1)


def read_field(data: mmap.mmap | memoryview, place: int, before: int) -> tuple[int, int, int]:
    """Return a field's number, its type (0 at the end of the struct) and the place behind.

    Raises:
        DamagedPages: a field has no type.
    """
    head = data[place]
    place += 1
    delta, kind = head >> 4, head & 15
    if not head:
        return before, 0, place
    if not kind:
        raise DamagedPages("a field has no type")
    if delta:
        return before + delta, kind, place
    number, place = _read_signed(data, place)
    return number, kind, place


def _skip(data: mmap.mmap, place: int, kind: int, depth: int) -> int:
    """Return the place behind a value."""
    if depth > _MAX_DEPTH:
        raise DamagedPages("the header of a page is nested too deeply")
    behind = skip_plain(data, place, kind)
    if behind is not None:
        return behind
    if kind == _STRUCT:
        field = 0
        while True:
            field, inner, place = read_field(data, place, field)
            if not inner:
                return place
            place = _skip(data, place, inner, depth + 1)
    # The headers have neither lists nor maps.
    raise DamagedPages(f"the header of a page has a value of the type {kind}")


def skip_plain(data: mmap.mmap | memoryview, place: int, kind: int) -> int | None:
    """Return the place behind a field's value that holds no other values; None: its type does."""
    if kind in (_TRUE, _FALSE):
        return place
    if kind == _BYTE:
        return place + 1
    if kind in _INTEGERS:
        return read_varint(data, place)[1]
    if kind == _DOUBLE:
        return place + 8
    if kind == _BINARY:
        length, place = read_varint(data, place)
        return place + length
    return None


def _read_signed(data: mmap.mmap | memoryview, place: int) -> tuple[int, int]:
    value, place = read_varint(data, place)
    return (value >> 1) ^ -(value & 1), place
