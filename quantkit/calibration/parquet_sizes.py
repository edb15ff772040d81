"""How much memory the columns of a parquet file take when they are unpacked, from its pages.

Where every row names the same text of a dictionary, the rows take thousands of times what the
dictionary does. Such texts are left in their dictionaries, which the library can do of any column,
but for those within lists whose writer went on without the dictionary: it starts so when the
dictionary is full, as it is of most chats. Of these the longest text is measured.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration.parquet_pages import DamagedPages, Page, walk_pages
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from pyarrow import ColumnChunkMetaData
    from pyarrow.parquet import FileMetaData

_LEAST_BYTES = 128 << 20
_MOST_TIMES = 128
"""What a file may unpack to: this many bytes, or so many times its own. Texts are packed to a third
or a tenth."""
_VALUE_BYTES = 16
"""Of a value besides its contents: its index in a dictionary, its levels, the offset of its row."""
_MOST_COLUMNS = 10_000
_DELTA_TEXTS = "DELTA_BYTE_ARRAY"
"""An encoding in which each text may go on from all of the one before."""
_TEXT = "BYTE_ARRAY"


@dataclass(frozen=True)
class _Chunk:
    """What the pages of one column chunk come to."""

    path: str
    """Of its column: `messages.list.element.content`."""
    base: int
    """Bytes, with texts in their dictionary."""
    referring: int
    """Values that are numbers of texts in the dictionary."""
    longest: int
    """Bytes of the longest of those, at most."""
    is_mixed: bool
    """Whether other values are stored without the dictionary."""

    @property
    def in_list(self) -> bool:
        """Whether the column lies within another one."""
        return "." in self.path


def find_dictionaries(path: Path, metadata: FileMetaData, wanted: Sequence[str]) -> list[str]:
    """Return the paths of columns whose texts have to stay in dictionaries.

    Args:
        path: of the file.
        metadata: of it.
        wanted: names of the columns that will be read.

    Raises:
        CalibrationError: the columns unpack to more than the size of the file justifies.
        DamagedPages: a page's header is damaged.
        OSError: the file cannot be read.
    """
    if metadata.num_columns > _MOST_COLUMNS:
        raise CalibrationError(f"{path} has {metadata.num_columns} columns")
    size = path.stat().st_size
    allowed = max(_LEAST_BYTES, _MOST_TIMES * size)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as file:
        chunks = [_measure(file, chunk) for chunk in _list_chunks(metadata, wanted)]
        base = sum(chunk.base for chunk in chunks)
    if base > allowed:
        raise CalibrationError(
            f"{path} has {size} bytes and unpacks to more than {allowed >> 20} MB: these are no "
            f"texts; write it again if they are, in smaller files"
        )
    if base + sum(chunk.referring * chunk.longest for chunk in chunks) <= allowed:
        return []
    inner = [chunk for chunk in chunks if chunk.in_list]
    mixed = {chunk.path for chunk in inner if chunk.is_mixed}
    spread = sum(chunk.referring * chunk.longest for chunk in inner if chunk.path in mixed)
    if base + spread > allowed:
        raise CalibrationError(
            f"{path} has {size} bytes and may unpack to more than {allowed >> 20} MB, since its "
            f"rows share texts: write it again without dictionaries (use_dictionary=False)"
        )
    return sorted({chunk.path for chunk in chunks if chunk.referring} - mixed)


def _list_chunks(metadata: FileMetaData, wanted: Sequence[str]) -> list[ColumnChunkMetaData]:
    chosen = [
        index
        for index in range(metadata.num_columns)
        if metadata.schema.column(index).path.partition(".")[0] in wanted
    ]
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return [group.column(index) for group in groups for index in chosen]


def _measure(file: mmap.mmap, chunk: ColumnChunkMetaData) -> _Chunk:
    """Add up the pages of a column chunk.

    Raises:
        DamagedPages: a page's header is damaged.
    """
    path = chunk.path_in_schema
    if not chunk.num_values:
        # The library reads no page of it, and nothing has to lie where it says.
        return _Chunk(path, 0, 0, 0, is_mixed=False)
    start = chunk.data_page_offset
    # As the library does: some writers give 0 for a dictionary that is not there.
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    pages = list(walk_pages(file, start, chunk.total_compressed_size))
    values = sum(page.values for page in pages)
    unpacked = sum(page.uncompressed for page in pages)
    if _DELTA_TEXTS in chunk.encodings:
        unpacked *= max(1, values)
    base = unpacked + values * _VALUE_BYTES
    referring = sum(page.values for page in pages if page.refers)
    if chunk.physical_type != _TEXT or not referring:
        return _Chunk(path, base, 0, 0, is_mixed=False)
    is_mixed = any(page.values and not page.refers for page in pages)
    dictionary = next((page for page in pages if page.is_dictionary), None)
    if dictionary is None:
        raise DamagedPages("a column refers to a dictionary that it does not have")
    longest = dictionary.uncompressed
    if is_mixed and referring * longest > _LEAST_BYTES and longest <= _LEAST_BYTES:
        longest = _find_longest(file, chunk.compression, dictionary)
    return _Chunk(path, base, referring, longest, is_mixed)


def _find_longest(file: mmap.mmap, compression: str, page: Page) -> int:
    """Return the bytes of the longest text in a dictionary; of all where they cannot be read."""
    import pyarrow

    content = file[page.start : page.start + page.compressed]
    try:
        if compression != "UNCOMPRESSED":
            codec = pyarrow.Codec(compression.lower())
            content = codec.decompress(content, page.uncompressed, asbytes=True)
    except (pyarrow.ArrowException, ValueError, OSError):
        return page.uncompressed
    longest = place = 0
    while place + 4 <= len(content):
        length = int.from_bytes(content[place : place + 4], "little")
        longest = max(longest, length)
        place += 4 + length
    return min(longest, page.uncompressed)
