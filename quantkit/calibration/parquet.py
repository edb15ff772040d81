"""Rows of a parquet file, in no more memory than its bytes justify.

A file of some kilobytes can hold rows of gigabytes: a text that a dictionary has once and every row
names, or a page that is nothing but repetition. So the pages are measured first
(`parquet_sizes`), texts stay in their dictionaries, and a row is unpacked by itself, up to a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.calibration.parquet_footer import check_sizes, read_footer
from quantkit.calibration.parquet_sizes import allowed_bytes, find_dictionaries
from quantkit.calibration.sources import (
    MOST_ROW_BYTES,
    Columns,
    Row,
    Rows,
    check_columns,
    check_domain,
    make_row,
)
from quantkit.checkpoint.mistaken import recognise_file
from quantkit.errors import CalibrationError, MissingPackageError

if TYPE_CHECKING:
    from pyarrow import Schema, Table

_CELL_BYTES = 64
"""What a value takes in Python besides its contents."""


def open_parquet(data: str, split: str, columns: Columns) -> Rows:
    """Return the rows of a parquet file; `split` is of no use here.

    Raises:
        CalibrationError: the file cannot be read, lacks the columns, or holds far more than its
            size lets one expect.
        MissingPackageError: pyarrow is not installed.
    """
    wanted: list[str] = []

    def choose(names: Sequence[str]) -> Sequence[str]:
        check_columns(names, columns, data)
        check_domain(names, columns, data)
        wanted.extend(name for name in columns.names if name in names)
        return wanted

    table, _ = _read_table(data, choose)

    def read(index: int) -> Row:
        where = f"{data}: row {index}"
        return make_row(_read_cells(table, wanted, index, [MOST_ROW_BYTES], where), columns, where)

    return Rows(data, len(table), read)


def read_whole(data: str) -> Table:
    """Return all rows and columns of a parquet file, with no text left in a dictionary.

    Raises:
        CalibrationError, MissingPackageError: as `open_parquet`.
    """
    table, plain = _read_table(data, lambda names: names)
    if table.schema.equals(plain):
        return table
    import pyarrow

    allowed = left = allowed_bytes(Path(data).stat().st_size)
    rows = []
    for index in range(len(table)):
        budget = [MOST_ROW_BYTES]
        rows.append(_read_cells(table, plain.names, index, budget, f"{data}: row {index}"))
        left -= MOST_ROW_BYTES - budget[0]
        if left < 0:
            raise CalibrationError(
                f"{data} unpacks to more than {allowed >> 20} MB, since its rows share texts: "
                f"write it again in smaller files"
            )
    return pyarrow.Table.from_pylist(rows, schema=plain)


def _read_table(
    data: str, choose: Callable[[Sequence[str]], Sequence[str]]
) -> tuple[Table, Schema]:
    """Return columns of a file, some texts in dictionaries, and their schema without those.

    Args:
        data: the file.
        choose: takes the names of all columns, and returns those that are read.

    Raises:
        CalibrationError, MissingPackageError: as `open_parquet`.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError(
            "pyarrow", "reading a parquet file", "pip install pyarrow"
        ) from error

    try:
        footer = read_footer(Path(data), allowed_bytes(Path(data).stat().st_size))
        found = parquet.ParquetFile(data)
        if footer is not None:
            check_sizes(footer, found.schema)
        plain = found.schema_arrow
        wanted = list(choose(plain.names))
        twice = next((name for name in wanted if plain.names.count(name) > 1), None)
        if twice is not None:
            raise CalibrationError(f"{data}: the column {twice!r} is there twice")
        dictionaries = find_dictionaries(Path(data), found.metadata, plain, wanted)
        found = parquet.ParquetFile(data, read_dictionary=dictionaries)
        # One by one: the library does not join dictionaries that lie within lists.
        groups = [found.read_row_group(at, wanted) for at in range(found.num_row_groups)]
        table = pyarrow.concat_tables(groups or [found.schema_arrow.empty_table()])
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = recognise_file(Path(data)) or _reason(error)
        raise CalibrationError(f"cannot read {data}: {reason}") from error
    return table, plain


def _read_cells(
    table: Table, wanted: Sequence[str], index: int, left: list[int], where: str
) -> dict[str, Any]:
    """Return a row as Python has it; `left` as in `_unpack`."""
    import pyarrow

    try:
        return {name: _unpack(table[name][index], left, where) for name in wanted}
    # A text that is not UTF-8, or a date that Python does not have.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise CalibrationError(f"{where} cannot be read: {_reason(error)}") from error


def _unpack(value: Any, left: list[int], where: str) -> Any:
    """Return a cell as Python has it.

    Args:
        value: a scalar of pyarrow.
        left: bytes that the row may still take; what is taken is subtracted.

    Raises:
        CalibrationError: the row is too large.
    """
    from pyarrow import types

    if types.is_dictionary(value.type):
        value = value.value
    left[0] -= _CELL_BYTES
    if value is None or not value.is_valid:
        found: Any = None
    elif types.is_nested(value.type) and not types.is_struct(value.type):
        found = []
        for each in value.values:
            found.append(_unpack(each, left, where))
    elif types.is_struct(value.type):
        found = {name: _unpack(inner, left, where) for name, inner in value.items()}
    else:
        if hasattr(value, "as_buffer"):
            left[0] -= value.as_buffer().size
        _check_left(left, where)
        found = value.as_py()
    _check_left(left, where)
    return found


def _check_left(left: Sequence[int], where: str) -> None:
    if left[0] < 0:
        raise CalibrationError(
            f"{where} has more than {MOST_ROW_BYTES >> 20} MB: cut it into several rows"
        )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
