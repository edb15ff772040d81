"""Pages of parquet that count the lengths of their texts once more."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from quantkit.calibration.rows import open_rows
from quantkit.calibration.sources import Columns
from quantkit.errors import CalibrationError

ENCODINGS = ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"]
TEXTS = ["", "a text", "a text that goes on", None] * 300 + [f"text {row}" * 3 for row in range(99)]
CHATS = [[{"role": "user", "content": text or "x"}] * (row % 3) for row, text in enumerate(TEXTS)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_lengths_as_differences_are_read(
    tmp_path: Path, encoding: str, version: str, compression: str
) -> None:
    """With nulls and within lists, in either kind of page."""
    path = tmp_path / "rows.parquet"
    options = {"data_page_version": version, "compression": compression, "data_page_size": 2000}
    table = pa.table({"text": TEXTS, "messages": CHATS})
    parquet.write_table(
        table, path, use_dictionary=False, column_encoding=_name(encoding), **options
    )
    used = {parquet.read_metadata(path).row_group(0).column(each).encodings for each in range(3)}
    assert all(encoding in encodings for encodings in used)
    found = open_rows(str(path), "parquet", "train", Columns("text", False))

    assert found.count == len(TEXTS)
    assert found.read(1).text == "a text"
    assert found.read(len(TEXTS) - 1).text == TEXTS[-1]


def _name(encoding: str) -> dict[str, str]:
    inner = [f"messages.list.element.{key}" for key in ("role", "content")]
    return dict.fromkeys(["text", *inner], encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_more_lengths_than_values_are_refused(tmp_path: Path, encoding: str) -> None:
    """Some bytes would be two hundred million texts."""
    path = tmp_path / "rows.parquet"
    field = pa.field("text", pa.string(), nullable=False)
    table = pa.table({"text": pa.array([""] * 1000)}, schema=pa.schema([field]))
    options = {"compression": "none", "write_statistics": False}
    parquet.write_table(
        table, path, use_dictionary=False, column_encoding={"text": encoding}, **options
    )
    content = path.read_bytes()
    # Values of a block, miniblocks, and all values: the first stream, or what follows prefixes.
    honest = b"\x80\x01\x04\xe8\x07"
    many = b"\x80\x80\x80\x80\x01\x01\xff\x83\xaf\x5f\0\0\0"
    place = content.rindex(honest)
    path.write_bytes(content[:place] + many + content[place + len(many) :])

    with pytest.raises(CalibrationError, match="more texts than it says"):
        open_rows(str(path), "parquet", "train", Columns("text", False))
