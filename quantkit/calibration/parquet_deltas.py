"""How many texts a page of a parquet file holds whose lengths are stored as differences.

Such a page counts its lengths a second time, and the library believes that number: some bytes can
say that a billion texts of no length follow. Here it is compared with the one in the page's header.
Format: https://github.com/apache/parquet-format, `Encodings.md`.
"""

from __future__ import annotations

import mmap

from quantkit.calibration.parquet_pages import DamagedPages, Page
from quantkit.varints import UnendingNumber, read_varint

LENGTHS, TEXTS = 6, 7
"""DELTA_LENGTH_BYTE_ARRAY and DELTA_BYTE_ARRAY, in which prefixes have lengths, too."""
_RUNS = 3
"""RLE: how levels are stored."""
_LEAST_VALUES = 32
"""Of a miniblock."""


def check_lengths(
    file: mmap.mmap, page: Page, compression: str, *, nullable: bool, repeated: bool
) -> None:
    """Refuse a page that has more lengths than values.

    Args:
        file: that has the page.
        page: of data, stored in one of these two ways.
        compression: of its column.
        nullable, repeated: whether the values have levels that say which are null or begin a list.

    Raises:
        DamagedPages: it has, or cannot be read.
    """
    try:
        content, place = _find_values(file, page, compression, (nullable, repeated))
        if place >= len(content):
            return
        if page.encoding == TEXTS:
            place = _skip_lengths(content, place, page.values)
        if _read_count(content, place)[2] > page.values:
            raise DamagedPages("a page has more texts than it says")
    except (IndexError, UnendingNumber):
        raise DamagedPages("the lengths of a page are cut short") from None


def _find_values(
    file: mmap.mmap, page: Page, compression: str, levels: tuple[bool, bool]
) -> tuple[memoryview, int]:
    """Return what a page holds, and where its values begin in it."""
    import pyarrow

    start, end = page.start, page.start + page.compressed
    size = page.uncompressed
    if page.levels is not None:
        # They are in front, and never packed.
        start, size = start + page.levels, size - page.levels
    content = file[start:end]
    if compression != "UNCOMPRESSED" and page.is_packed:
        try:
            codec = pyarrow.Codec(compression.lower())
            content = codec.decompress(content, size, asbytes=True)
        except (pyarrow.ArrowException, ValueError, OSError, NotImplementedError):
            raise DamagedPages("a page cannot be unpacked") from None
    place = 0
    if page.levels is None:
        # Writers name any way for levels that are not there.
        ways = [way for way, there in zip(page.level_encodings, levels, strict=True) if there]
        if any(way != _RUNS for way in ways):
            raise DamagedPages("the levels of a page are stored in a way that is not read")
        for _ in ways:
            place += 4 + int.from_bytes(content[place : place + 4], "little")
    return memoryview(content), place


def _read_count(content: memoryview, place: int) -> tuple[int, int, int, int]:
    """Return values of a miniblock, miniblocks of a block, all values, and the place behind."""
    block, place = read_varint(content, place)
    parts, place = read_varint(content, place)
    count, place = read_varint(content, place)
    _, place = read_varint(content, place)
    if not parts or block // parts < _LEAST_VALUES:
        raise DamagedPages("the lengths of a page are in blocks that cannot be")
    return block // parts, parts, count, place


def _skip_lengths(content: memoryview, place: int, most: int) -> int:
    """Return the place behind lengths, of which there may be `most`."""
    values, parts, left, place = _read_count(content, place)
    if left > most:
        raise DamagedPages("a page has more texts than it says")
    left -= 1
    while left > 0:
        _, place = read_varint(content, place)
        widths = content[place : place + parts]
        place += parts
        for width in widths:
            if left > 0:
                place += values * width // 8
                left -= values
        if place > len(content):
            raise DamagedPages("the lengths of a page are cut short")
    return place
