"""Which kind of text each token of a window is of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from quantkit.calibration.windows import draw
from quantkit.errors import CalibrationError
from tests.helpers import pico_text

TEXTS = [pico_text(words, seed) for seed, words in enumerate((3, 40, 9, 2, 60, 5, 17, 30))]
KINDS = ["code", "prose", "code", None, "chat", "prose", "", "prose"]
ROWS = [{"text": text, "kind": kind} for text, kind in zip(TEXTS, KINDS, strict=True)]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def label_slowly(
    tokenizer: Any, rows: Sequence[dict[str, Any]], length: int
) -> list[tuple[list[int], list[str]]]:
    """Windows of joined rows with each token's kind, one token at a time."""
    windows: list[tuple[list[int], list[str]]] = []
    ids: list[int] = []
    kinds: list[str] = []
    for row in rows:
        for token in tokenizer(row["text"]).input_ids:
            kind = row.get("kind") or "none named"
            if not ids and token != 0:
                ids, kinds = [0], [kind]
            ids.append(token)
            kinds.append(kind)
            if len(ids) == length:
                windows.append((ids, kinds))
                ids, kinds = [], []
    return windows


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_every_token_has_the_domain_of_its_row(
    jsonl: Path, tokenizer: Any, load: Any, order: str
) -> None:
    """Whatever order the rows come in; the BOS in front of a window is of the token behind it."""
    rows = ROWS if order == "sequential" else [ROWS[index] for index in draw(len(ROWS), 5)]
    want = label_slowly(tokenizer, rows, 16)

    got = load(jsonl, samples=len(want), order=order, seed=5, domain_column="kind")

    assert got.ids.tolist() == [ids for ids, _ in want]
    assert got.domains.dtype == np.int16
    assert [[got.domain_names[number] for number in row] for row in got.domains] == [
        kinds for _, kinds in want
    ]
    sizes = Counter(kind for _, kinds in want for kind in kinds)
    assert list(got.domain_names) == [name for name, _ in sizes.most_common()]
    assert (
        "rows.jsonl: rows without a value in 'kind': 2 of 8; they are shown as 'none named'"
        in got.notes
    )


def test_domains_do_not_change_the_windows(jsonl: Path, load: Any) -> None:
    """The same ids and hash with and without; unasked for, there are none."""
    plain, named = load(jsonl), load(jsonl, domain_column="kind")

    assert (plain.domains, plain.domain_names) == (None, ())
    assert plain.sha256 == named.sha256
    np.testing.assert_array_equal(plain.ids, named.ids)


def test_parquet_and_jsonl_give_the_same_domains(tmp_path: Path, jsonl: Path, load: Any) -> None:
    """The kind of file does not matter."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)

    first, second = (load(data, order="sequential", domain_column="kind") for data in (jsonl, path))

    np.testing.assert_array_equal(first.domains, second.domains)
    assert first.domain_names == second.domain_names


def test_a_dataset_gives_its_column(tmp_path: Path, load: Any) -> None:
    """A folder that `datasets` wrote; chats have a domain as texts do."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "stored"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))

    got = load(folder, order="sequential", domain_column="kind")

    assert set(got.domain_names) <= {"code", "prose", "chat", "none named"}


def test_a_row_without_the_key_has_no_domain(tmp_path: Path, load: Any) -> None:
    """Only a column that no row has is a mistake."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXTS[4]}, ROWS[1]])

    got = load(path, order="sequential", domain_column="kind", samples=40)

    assert set(got.domain_names) == {"none named", "prose"}
    with pytest.raises(CalibrationError, match=r"no column 'kin' \('text', 'kind'\).*domain_col"):
        load(path, domain_column="kin")


def test_a_column_that_parquet_lacks_is_named(tmp_path: Path, load: Any) -> None:
    """With the columns that there are."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)

    with pytest.raises(CalibrationError, match=r"no column 'topic' \('text', 'kind'\)"):
        load(path, domain_column="topic")


def test_chats_have_the_domain_of_their_row(tmp_path: Path, tokenizer: Any, load: Any) -> None:
    """The column stands beside the messages."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": TEXTS[4]}], "kind": "chat"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])

    got = load(path, domain_column="kind", tokenizer=tokenizer)

    assert got.domain_names == ("chat",)


def test_a_text_file_has_no_columns(tmp_path: Path, load: Any) -> None:
    """To ask for domains of one text is refused in one line."""
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[4])

    with pytest.raises(CalibrationError, match=r"domain_column 'kind' needs rows .*plain text"):
        load(path, domain_column="kind")


def test_a_domain_is_a_text_or_a_number(tmp_path: Path, load: Any) -> None:
    """Numbers are names too; a list is an error that names the row."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXTS[4], "kind": 7}])
    assert load(path, domain_column="kind").domain_names == ("7",)
    path = write_jsonl(tmp_path / "lists.jsonl", [{"text": TEXTS[4], "kind": ["a"]}])
    with pytest.raises(CalibrationError, match=r"lists\.jsonl:1: 'kind' is of type list"):
        load(path, domain_column="kind")


def test_rare_domains_are_shown_as_one(tmp_path: Path, load: Any) -> None:
    """Beyond 32 the 31 with the most tokens stay; one that is called other joins the others."""
    names = [*(f"kind {number}" for number in range(40)), "other"]
    rows = [
        {"text": TEXTS[4][: 300 - 5 * number], "kind": name} for number, name in enumerate(names)
    ]
    rows[40]["text"] = TEXTS[4]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    got = load(path, order="sequential", domain_column="kind", samples=2000)

    assert len(got.domain_names) == 32
    assert got.domain_names[-1] == "other"
    assert "other" not in got.domain_names[:-1]
    assert set(got.domain_names[:-1]) == {f"kind {number}" for number in range(31)}
    assert int(got.domains.max()) == 31
    assert any("'kind' has 41 values: the 31 with the most tokens" in note for note in got.notes)


def test_names_are_short_and_printable(tmp_path: Path, load: Any) -> None:
    """What a file calls its rows goes into reports."""
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": TEXTS[4], "kind": "a\x1b[31m\n b" + "c" * 100}]
    )

    (name,) = load(path, domain_column="kind").domain_names

    assert name.startswith("a?[31m bccc")
    assert len(name) == 60
