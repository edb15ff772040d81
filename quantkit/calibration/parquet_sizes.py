"""How much memory the columns of a parquet file take when they are unpacked, from its pages.

Where every row names the same text of a dictionary, the rows take thousands of times what the
dictionary does. Such texts are left in their dictionaries, which the library can do of any column,
but for those within lists whose writer went on without the dictionary: it starts so when the
dictionary is full, as it is of most chats. Of these the longest text is measured.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration.parquet_deltas import LENGTHS, TEXTS, check_lengths
from quantkit.calibration.parquet_pages import DamagedPages, Page, walk_pages
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from pyarrow import ColumnChunkMetaData, DataType, Schema
    from pyarrow.parquet import ColumnSchema, FileMetaData

_LEAST_BYTES = 128 << 20
_MOST_TIMES = 128
"""What a file may unpack to: this many bytes, or so many times its own. Texts are packed to a third
or a tenth."""
_VALUE_BYTES = 16
"""Of a value besides its contents: its index in a dictionary, its levels, the offset of its row."""
_MOST_COLUMNS = 10_000
_DELTA_TEXTS = "DELTA_BYTE_ARRAY"
"""An encoding in which each text may go on from all of the one before: in the footer. The
library believes what the header of a page says of it."""
_TEXT, _FIXED = "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"


@dataclass(frozen=True)
class _Chunk:
    """What the pages of one column chunk come to."""

    path: str
    """Of its column: `messages.list.element.content`."""
    rows: int
    values: int
    """With those that are null."""
    width: int
    """Bytes of each value, where all have as many."""
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


def allowed_bytes(size: int) -> int:
    """Return what a file of `size` bytes may unpack to."""
    return max(_LEAST_BYTES, _MOST_TIMES * size)


def find_dictionaries(
    path: Path, metadata: FileMetaData, schema: Schema, wanted: Sequence[str]
) -> list[str]:
    """Return the paths of columns whose texts have to stay in dictionaries.

    Args:
        path: of the file.
        metadata: of it.
        schema: of what the library makes of it.
        wanted: names of the columns that will be read.

    Raises:
        CalibrationError: the columns unpack to more than the size of the file justifies.
        DamagedPages: a page's header is damaged.
        OSError: the file cannot be read.
    """
    if metadata.num_columns > _MOST_COLUMNS:
        raise CalibrationError(f"{path} has {metadata.num_columns} columns")
    size = path.stat().st_size
    allowed = allowed_bytes(size)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as file:
        chunks = [
            _measure(file, chunk, column, rows)
            for chunk, column, rows in _list_chunks(metadata, wanted)
        ]
        base = sum(chunk.base for chunk in chunks)
        base += _measure_lists(chunks, schema)
        if base > allowed:
            raise CalibrationError(
                f"{path} has {size} bytes and unpacks to more than {allowed >> 20} MB: these are "
                f"no texts; write it again if they are, in smaller files"
            )
        # Each page is unpacked for it, which takes what was just allowed.
        for chunk, column, _ in _list_chunks(metadata, wanted):
            _check_lengths(file, chunk, column)
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


def _list_chunks(
    metadata: FileMetaData, wanted: Sequence[str]
) -> Iterator[tuple[ColumnChunkMetaData, ColumnSchema, int]]:
    """Yield each chunk of the columns, its column, and the rows of its group."""
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    chosen = [
        (index, column)
        for index, column in enumerate(columns)
        if any(_is_within(column.path, name) for name in wanted)
    ]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for index, column in chosen:
            yield group.column(index), column, group.num_rows


def _check_lengths(file: mmap.mmap, chunk: ColumnChunkMetaData, column: ColumnSchema) -> None:
    """Refuse pages that count their texts in two ways.

    Raises:
        DamagedPages: there is one.
    """
    for page in _walk(file, chunk):
        if page.encoding in (LENGTHS, TEXTS):
            check_lengths(
                file,
                page,
                chunk.compression,
                nullable=column.max_definition_level > 0,
                repeated=column.max_repetition_level > 0,
            )


def _measure_lists(chunks: Sequence[_Chunk], schema: Schema) -> int:
    """Return the bytes of lists of one fixed length: one that is null takes as much as any."""
    found = 0
    for field in schema:
        items, is_outermost = _fixed_items(field.type)
        for chunk in chunks if items > 1 else ():
            if _is_within(chunk.path, field.name):
                lists = chunk.rows if is_outermost else max(chunk.rows, chunk.values)
                found += lists * items * (_VALUE_BYTES + chunk.width)
    return found


def _is_within(path: str, name: str) -> bool:
    """Whether a path may lie within the column `name`, which may have dots of its own."""
    return path == name or path.startswith(f"{name}.")


def _fixed_items(kind: DataType) -> tuple[int, bool]:
    """Return how many values one value of a type has by its lists of fixed length, at most.

    And whether no list of any length is around those.
    """
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return _fixed_items(kind.storage_type)
    if types.is_fixed_size_list(kind):
        return max(1, kind.list_size) * _fixed_items(kind.value_type)[0], True
    if not types.is_nested(kind):
        return 1, True
    inner = [_fixed_items(kind.field(index).type) for index in range(kind.num_fields)]
    items = max((count for count, _ in inner), default=1)
    return items, types.is_struct(kind) and all(outermost for _, outermost in inner)


def _walk(file: mmap.mmap, chunk: ColumnChunkMetaData) -> Sequence[Page]:
    """Return the pages of a column chunk.

    Raises:
        DamagedPages: a page's header is damaged.
    """
    if not chunk.num_values:
        # The library reads no page of it, and nothing has to lie where it says.
        return []
    start = chunk.data_page_offset
    # As the library does: some writers give 0 for a dictionary that is not there.
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    return list(walk_pages(file, start, chunk.total_compressed_size))


def _measure(
    file: mmap.mmap, chunk: ColumnChunkMetaData, column: ColumnSchema, rows: int
) -> _Chunk:
    """Add up the pages of a column chunk.

    Args:
        file: that has it.
        chunk: what the footer says of it.
        column: it is of.
        rows: of its group.

    Raises:
        DamagedPages: a page's header is damaged.
    """
    path = chunk.path_in_schema
    # Texts have their own lengths, and numbers fit into what each value is taken for.
    width = column.length if column.physical_type == _FIXED else 0
    pages = _walk(file, chunk)
    values = sum(page.values for page in pages)
    unpacked = sum(page.uncompressed for page in pages)
    is_delta = any(page.encoding == TEXTS for page in pages)
    if is_delta or _DELTA_TEXTS in chunk.encodings:
        unpacked *= max(1, values)
    base = unpacked + values * (_VALUE_BYTES + width)
    referring = sum(page.values for page in pages if page.refers)
    if chunk.physical_type != _TEXT or not referring:
        return _Chunk(path, rows, values, width, base, 0, 0, is_mixed=False)
    is_mixed = any(page.values and not page.refers for page in pages)
    dictionary = next((page for page in pages if page.is_dictionary), None)
    if dictionary is None:
        raise DamagedPages("a column refers to a dictionary that it does not have")
    longest = dictionary.uncompressed
    if is_mixed and referring * longest > _LEAST_BYTES and longest <= _LEAST_BYTES:
        longest = _find_longest(file, chunk.compression, dictionary)
    return _Chunk(path, rows, values, width, base, referring, longest, is_mixed)


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
