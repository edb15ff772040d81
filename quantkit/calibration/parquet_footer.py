"""The footer of a parquet file, walked before a library makes anything of it.

Arrow makes room for as many entries of a list as the list claims to have. And what it finds wrong
with the size statistics of a column, or with one that is encrypted, ends the process: pyarrow does
not expect an exception where it asks for a column. Format: `parquet.thrift` of
https://github.com/apache/parquet-format, in Thrift's compact protocol; the rules are those of
`SizeStatistics::Validate` in Arrow's C++ sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration.parquet_pages import DamagedPages, read_field, skip_plain
from quantkit.varints import UnendingNumber, read_varint

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetSchema

_MAGIC = b"PAR1"
_ENTRY_BYTES = 1000
"""Of an entry of a list of structs in Arrow's memory, at most; in the file one may have a byte."""
_MAX_DEPTH = 16
"""Of structs and lists in each other, of which the format has nine."""
_TRUTHS, _LIST, _SET, _MAP, _STRUCT = (1, 2), 9, 10, 11, 12
"""Types of the compact protocol."""
_ROW_GROUPS, _COLUMNS, _COLUMN_METADATA, _SIZES, _ENCRYPTION = 4, 1, 3, 16, 8
"""Fields on the way to a column's size statistics, and the one beside them of encrypted columns."""
_TEXT_BYTES, _REPETITION, _DEFINITION = 1, 2, 3
"""Fields of these."""

Place = tuple[int, ...]
"""Where a value stands: numbers of fields, and of entries in a list."""


@dataclass
class Footer:
    """What the footer says that the library must not be asked about before it was looked at."""

    sizes: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    """Column -> (field of its size statistics, entries), of all row groups."""
    encrypted: bool = False


def read_footer(path: Path, allowed: int) -> Footer | None:
    """Walk the footer of a file; None where there is none, which the library says better.

    Args:
        allowed: bytes that the entries of its lists may take.

    Raises:
        DamagedPages: it is damaged, or its lists claim more than there is.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if end[4:] != _MAGIC or length > size - 8:
            return None
        file.seek(size - 8 - length)
        data = file.read(length)
    found = Footer()
    walk = _Walk(
        memoryview(data), allowed // _ENTRY_BYTES, lambda at, entries: _note(found, at, entries)
    )
    try:
        walk.skip_struct(0, ())
    except (IndexError, UnendingNumber):
        raise DamagedPages("the footer is cut short") from None
    return found


def check_sizes(footer: Footer, schema: ParquetSchema) -> None:
    """Compare the size statistics with the columns that they are about.

    Args:
        schema: what the library read of the same footer.

    Raises:
        DamagedPages: they do not fit, or a column is encrypted.
    """
    if footer.encrypted:
        raise DamagedPages("a column is encrypted")
    for index, sizes in footer.sizes.items():
        # A column that the schema does not have, nobody asks for.
        if index >= len(schema):
            continue
        column = schema.column(index)
        levels = {
            _REPETITION: column.max_repetition_level,
            _DEFINITION: column.max_definition_level,
        }
        for part, entries in sizes:
            fits = column.physical_type == "BYTE_ARRAY"
            if part in levels:
                fits = entries in (0, levels[part] + 1)
            if not fits:
                raise DamagedPages(f"the size statistics of {column.path} are not those of it")


def _note(found: Footer, at: Place, entries: int) -> None:
    """Keep what stands at a place, if it is one of those that matter."""
    if len(at) < 5 or (at[0], at[2]) != (_ROW_GROUPS, _COLUMNS):
        return
    if at[4:] == (_ENCRYPTION,):
        found.encrypted = True
    elif at[4:6] == (_COLUMN_METADATA, _SIZES) and len(at) == 7:
        found.sizes.setdefault(at[3], set()).add((at[6], entries))


@dataclass
class _Walk:
    """A walk over all values of a Thrift message; `tell` gets each with its number of entries."""

    data: memoryview
    left: int
    """Entries of lists of structs that may still come."""
    tell: Callable[[Place, int], None]

    def skip_struct(self, place: int, at: Place) -> int:
        """Return the place behind a struct."""
        number = 0
        while True:
            number, kind, place = read_field(self.data, place, number)
            if not kind:
                return place
            place = self.skip(place, kind, (*at, number))

    def skip(self, place: int, kind: int, at: Place, *, within: bool = False) -> int:
        """Return the place behind a value; a truth has a byte `within` a list alone."""
        if len(at) > _MAX_DEPTH:
            raise DamagedPages("the footer is nested too deeply")
        if kind in (_LIST, _SET):
            return self._skip_list(place, at)
        if kind == _STRUCT:
            self.tell(at, 0)
            return self.skip_struct(place, at)
        if kind == _MAP:
            # The format has none.
            raise DamagedPages("the footer has a map")
        self.tell(at, 0)
        if within and kind in _TRUTHS:
            return place + 1
        behind = skip_plain(self.data, place, kind)
        if behind is None:
            raise DamagedPages(f"the footer has a value of the type {kind}")
        return behind

    def _skip_list(self, place: int, at: Place) -> int:
        head = self.data[place]
        place += 1
        kind, count = head & 15, head >> 4
        if count == 15:
            count, place = read_varint(self.data, place)
        if kind == _STRUCT:
            self.left -= count
        if count > len(self.data) - place or self.left < 0:
            raise DamagedPages(f"a list in the footer claims to have {count} entries")
        self.tell(at, count)
        for index in range(count):
            place = self.skip(place, kind, (*at, index), within=True)
        return place
