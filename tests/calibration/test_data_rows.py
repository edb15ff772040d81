"""Windows of the rows of jsonl and parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from quantkit.calibration.rows import open_rows
from quantkit.calibration.sources import Columns
from quantkit.calibration.windows import draw
from quantkit.errors import CalibrationError
from tests.helpers import pico_text

TEXTS = [pico_text(words, seed) for seed, words in enumerate((3, 40, 9, 2, 60, 5, 17, 30))]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])


def cut_slowly(rows: list[list[int]], bos: int | None, length: int) -> list[list[int]]:
    """Windows of joined rows, one token at a time."""
    stream = [token for row in rows for token in row]
    windows: list[list[int]] = []
    window: list[int] = []
    for token in stream:
        if not window and bos is not None and token != bos:
            window.append(bos)
        window.append(token)
        if len(window) == length:
            windows.append(window)
            window = []
    return windows


def test_rows_in_order_are_joined_and_cut(jsonl: Path, tokenizer: Any, load: Any) -> None:
    """Each row is what the tokenizer makes of it, and every window begins with BOS."""
    want = cut_slowly([tokenizer(text).input_ids for text in TEXTS], 0, 16)

    got = load(jsonl, samples=len(want), order="sequential")

    assert got.ids.tolist() == want
    assert (got.ids[:, 0] == 0).all()
    assert (got.weights == 1).all()


def test_rows_of_a_tokenizer_without_bos_are_joined_bare(
    jsonl: Path, plain_tokenizer: Any, load: Any
) -> None:
    """Where no row begins with BOS, no window gets one."""
    want = cut_slowly([plain_tokenizer(text).input_ids for text in TEXTS], None, 16)

    got = load(jsonl, samples=len(want), order="sequential", tokenizer=plain_tokenizer)

    assert got.ids.tolist() == want


def test_random_order_shuffles_rows_by_the_seed(jsonl: Path, tokenizer: Any, load: Any) -> None:
    """The rows come in the drawn order, and a seed repeats itself."""
    rows = [tokenizer(TEXTS[index]).input_ids for index in draw(len(TEXTS), 5)]

    got = load(jsonl, samples=3, seed=5)

    assert got.ids.tolist() == cut_slowly(rows, 0, 16)[:3]
    assert got.sha256 == load(jsonl, samples=3, seed=5).sha256
    assert got.sha256 != load(jsonl, samples=3, seed=6).sha256


def test_long_rows_are_counted(tmp_path: Path, tokenizer: Any, load: Any) -> None:
    """A row with more tokens than a window goes on in the next one, and the note says so."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 40}, {"text": "y"}, {"text": "z"}])

    got = load(path, samples=2, order="sequential")

    assert got.notes == (
        "rows.jsonl: rows longer than a window of 16 tokens: 1 of 1; each is cut and goes on in "
        "the next window",
    )


def test_fewer_windows_than_asked_for_is_a_note(jsonl: Path, load: Any) -> None:
    """What there is, is used."""
    got = load(jsonl, samples=1000, sequence_length=64)

    assert 0 < len(got.ids) < 1000
    assert any(f"only {len(got.ids)} of 1000 windows" in note for note in got.notes)


def test_another_column_can_hold_the_text(tmp_path: Path, load: Any) -> None:
    """text_column names it."""
    renamed = write_jsonl(tmp_path / "renamed.jsonl", [{"body": text} for text in TEXTS])
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": text} for text in TEXTS])

    assert load(renamed, text_column="body").sha256 == load(plain).sha256


def test_blank_lines_and_empty_rows_are_left_out(tmp_path: Path, jsonl: Path, load: Any) -> None:
    """Blank lines do not count; empty rows are noted."""
    lines = jsonl.read_text().splitlines()
    lines[2:2] = ["", '{"text": ""}', "   ", '{"text": " \\n"}']
    path = tmp_path / "gaps.jsonl"
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")

    got = load(path, order="sequential", samples=20)

    assert got.ids.tolist() == load(jsonl, order="sequential", samples=20).ids.tolist()
    assert "gaps.jsonl: empty rows that were left out: 2" in got.notes


def test_a_bos_in_the_text_of_a_row_is_not_counted_twice(tmp_path: Path, load: Any) -> None:
    """Texts that were rendered before bring their BOS along."""
    marked = write_jsonl(tmp_path / "m.jsonl", [{"text": "<|begin|>" + text} for text in TEXTS])
    plain = write_jsonl(tmp_path / "p.jsonl", [{"text": text} for text in TEXTS])

    got = load(marked, samples=8, order="sequential")

    assert got.sha256 == load(plain, samples=8, order="sequential").sha256
    assert any("rows that would begin with <|begin|> twice: " in note for note in got.notes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"rows\.jsonl:2: not valid JSON: .*column"),
        (
            '["text"]',
            r"rows\.jsonl:2: a row is a JSON object like \{\"text\": \.\.\.\}, not a list",
        ),
        (
            '{"txt": "a", "id": 1}',
            r"rows\.jsonl:2: neither 'text' nor 'messages' among the columns",
        ),
        ("{}", r"rows\.jsonl:2: neither 'text' nor 'messages' among the columns \(none\)"),
        ('{"text": 3}', r"rows\.jsonl:2: 'text' is of type int; expected a text, or"),
        ('{"text": null}', r"rows\.jsonl:2: 'text' is null"),
        ('{"messages": []}', r"rows\.jsonl:2: 'messages' is an empty list"),
        ('{"messages": [{"from": "human"}]}', r"rows\.jsonl:2: .* a list of dict with keys 'from'"),
        ('{"messages": "hello"}', None),
        ('{"text": "\xff"}', r"rows\.jsonl:2: not UTF-8 text"),
        ("[" * 100_000, r"rows\.jsonl:2: not valid JSON"),
        ('{"text": 1' + "0" * 5000 + "}", r"rows\.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, load: Any, line: str, message: str | None
) -> None:
    """Every row is checked, also those that would not be drawn."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "' + "ba ce " * 30 + '"}\n' + line + "\n", encoding="latin-1")

    if message is None:
        load(path, samples=1)
        return
    with pytest.raises(CalibrationError, match=message) as caught:
        load(path, samples=1, order="sequential")
    assert "\n" not in str(caught.value)


def test_a_misspelt_column_gets_the_nearest_name(tmp_path: Path, load: Any) -> None:
    """The columns that exist are listed."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"texts": "a", "id": 1}])

    with pytest.raises(CalibrationError, match=r"\('texts', 'id'\); did you mean 'texts'\?"):
        load(path)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path, load: Any) -> None:
    """JSON can spell what UTF-8 cannot hold."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab\\ud800"}\n')

    with pytest.raises(
        CalibrationError, match=r"rows\.jsonl:1: character 2 is half of a surrogate"
    ):
        load(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_without_rows_is_refused(tmp_path: Path, load: Any, name: str) -> None:
    """Empty is empty in every kind of file."""
    if name.endswith("parquet"):
        parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n \n")

    with pytest.raises(CalibrationError, match="is empty: it has no rows"):
        load(tmp_path / name)


def test_rows_too_few_for_a_window_are_refused(tmp_path: Path, load: Any) -> None:
    """The message says how many tokens there are."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": ""}])

    with pytest.raises(CalibrationError, match="too short: it has 2 tokens and a window needs 16"):
        load(path)


def test_parquet_without_the_column_names_its_columns(tmp_path: Path, load: Any) -> None:
    """The schema alone tells."""
    parquet.write_table(pa.table({"content": ["a"], "id": [1]}), tmp_path / "rows.parquet")

    with pytest.raises(CalibrationError, match=r"among the columns \('content', 'id'\)"):
        load(tmp_path / "rows.parquet")


def test_a_null_cell_of_parquet_names_its_row(tmp_path: Path, load: Any) -> None:
    """Rows are counted from 0, as their readers do."""
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "rows.parquet")

    with pytest.raises(CalibrationError, match=r"rows\.parquet: row 1: 'text' is null"):
        load(tmp_path / "rows.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing of the sort PAR1"])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, load: Any, content: bytes) -> None:
    """pyarrow's reason is passed on in one line."""
    (tmp_path / "rows.parquet").write_bytes(content)

    with pytest.raises(CalibrationError, match=r"cannot read .*rows\.parquet: \S") as caught:
        load(tmp_path / "rows.parquet")
    assert "\n" not in str(caught.value)


def test_no_more_rows_are_encoded_than_are_needed(tmp_path: Path, load: Any) -> None:
    """A wide file costs what its windows cost: a row behind them is never tokenised."""
    rows = [{"text": text} for text in [*TEXTS, "\ud800"]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    assert load(path, samples=2, order="sequential").ids.shape == (2, 16)
    with pytest.raises(CalibrationError, match=r"rows\.jsonl:9: character 0"):
        load(path, samples=1000, order="sequential")


def test_windows_own_their_memory(jsonl: Path, load: Any) -> None:
    """Records travel alone: no view keeps a whole text alive."""
    got = load(jsonl)

    assert got.ids.dtype == np.int64
    assert got.weights.dtype == np.float32
    assert got.ids.flags.c_contiguous


def test_a_line_that_never_ends_is_refused(tmp_path: Path, load: Any) -> None:
    """It is not read to its end."""
    line = b'{"text": "' + b"a" * (17 << 20)
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n' + line)

    with pytest.raises(CalibrationError, match=r"rows\.jsonl:2: a line of more than 16 MB"):
        load(tmp_path / "rows.jsonl")


def test_columns_without_end_are_not_all_named(tmp_path: Path, load: Any) -> None:
    """A message stays one that can be read."""
    row = {f"column {number}" + "x" * 900: 1 for number in range(500)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))

    with pytest.raises(CalibrationError, match="and 480 more") as caught:
        load(tmp_path / "rows.jsonl")
    assert len(str(caught.value)) < 2000


def test_texts_that_rows_share_are_unpacked_one_by_one(tmp_path: Path, load: Any) -> None:
    """Half a kilobyte of parquet would be two gigabytes of text, and is read all the same."""
    texts = pa.array([pico_text(40, 0), "y" * 500_000])
    indices = np.zeros(4000, np.int32)
    indices[1::2] = 1
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, texts)})
    parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    rows = open_rows(str(tmp_path / "rows.parquet"), "parquet", "train", Columns("text", False))

    assert rows.count == 4000
    assert rows.read(0).text == texts[0].as_py()
    assert pa.total_allocated_bytes() < 200 << 20


@pytest.mark.parametrize("rows", [1, 40_000])
def test_chats_in_several_groups_of_rows_are_read(tmp_path: Path, rows: int) -> None:
    """Also where a dictionary got full and the writer went on without it."""
    chats = [[{"role": "user", "content": f"{number} " + "w" * 40}] for number in range(rows)]
    table = pa.table({"messages": pa.array(chats)})
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path, row_group_size=30_000, dictionary_pagesize_limit=100_000)
    found = open_rows(str(path), "parquet", "train", Columns("text", False))

    assert found.count == rows
    assert found.read(rows - 1).messages == (chats[-1][0],)


def test_a_page_of_repetition_is_refused_by_its_header() -> None:
    """Six kilobytes that unpack to two hundred megabytes."""
    path = Path(__file__).parents[1] / "fuzzing/found/parquet/page-of-repetition/rows.parquet"

    with pytest.raises(CalibrationError, match="unpacks to more than 128 MB"):
        open_rows(str(path), "parquet", "train", Columns("text", False))


def test_a_row_beyond_any_text_is_refused(tmp_path: Path) -> None:
    """When it is asked for."""
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": pa.array(["a" * (17 << 20)])})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    found = open_rows(str(path), "parquet", "train", Columns("text", False))

    with pytest.raises(CalibrationError, match="row 0 has more than 16 MB"):
        found.read(0)


def test_a_text_of_parquet_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    """The library does not look before a text is asked for."""
    texts = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    )
    parquet.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    found = open_rows(str(tmp_path / "rows.parquet"), "parquet", "train", Columns("text", False))

    with pytest.raises(CalibrationError, match="row 0 cannot be read"):
        found.read(0)


def _refer_to_one(count: int) -> pa.Array:
    texts = pa.array([b"x" * (1 << 20)], pa.binary(1 << 20))
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), texts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pa.array([None] * 200, pa.binary(1 << 20)),
        lambda: _refer_to_one(200),
        lambda: pa.array([None] * 50, pa.list_(pa.int8(), 1 << 20)),
        lambda: pa.array([[None] * 50], pa.list_(pa.list_(pa.int8(), 1 << 20))),
    ],
    ids=["null", "dictionary", "list", "list-in-list"],
)
def test_values_of_one_length_take_it_each(tmp_path: Path, make: Callable[[], pa.Array]) -> None:
    """Also those that are null, or named by every row: they are unpacked to their whole length."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": make()}), path, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 100_000

    with pytest.raises(CalibrationError, match="unpacks to more than 128 MB"):
        open_rows(str(path), "parquet", "train", Columns("text", False))


def test_how_texts_are_stored_is_what_their_pages_say(tmp_path: Path) -> None:
    """A footer may leave out that each text goes on from the one before."""
    path = tmp_path / "rows.parquet"
    how = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    parquet.write_table(pa.table({"text": ["x" * 700_000] * 200}), path, compression="none", **how)
    content = bytearray(path.read_bytes())
    # Of the list of encodings, RLE and DELTA_BYTE_ARRAY: the second becomes PLAIN.
    content[content.rindex(b"\x25\x06\x0e") + 2] = 0
    path.write_bytes(bytes(content))
    column = parquet.read_metadata(path).row_group(0).column(0)
    assert set(column.encodings) == {"RLE", "PLAIN"}

    with pytest.raises(CalibrationError, match="unpacks to more than 128 MB"):
        open_rows(str(path), "parquet", "train", Columns("text", False))


def test_labels_in_lists_of_one_length_are_read(tmp_path: Path) -> None:
    """What rows justify is read as ever."""
    labels = pa.array([[0, 1] * 10] * 20_000, pa.list_(pa.int64(), 20))
    table = pa.table({"text": [f"text {row}" for row in range(20_000)], "labels": labels})
    parquet.write_table(table, tmp_path / "rows.parquet")
    columns = Columns("text", False, others=("labels",))
    found = open_rows(str(tmp_path / "rows.parquet"), "parquet", "train", columns)

    assert found.read(19_999).others == ([0, 1] * 10,)
