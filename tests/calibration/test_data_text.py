"""Windows of plain text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from quantkit.calibration.windows import draw
from quantkit.errors import CalibrationError
from tests.helpers import pico_text


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "general.txt"
    path.write_text(pico_text(400, 1), encoding="utf-8")
    return path


def test_sequential_windows_are_those_of_an_independent_script(
    text_file: Path, tokenizer_folder: Path, load: Any
) -> None:
    """Ten lines of transformers alone give the evaluation windows."""
    tok = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tok(text_file.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    body = 16 - 1
    windows = [[tok.bos_token_id, *ids[i * body : (i + 1) * body]] for i in range(5)]

    got = load(text_file, samples=5, order="sequential")

    assert got.ids.tolist() == windows
    assert got.ids.dtype == np.int64
    assert got.weights.dtype == np.float32
    assert got.weights.tolist() == np.ones((5, 16)).tolist()
    assert got.source == str(text_file)
    assert got.notes == ()


def test_a_tokenizer_without_bos_gives_windows_of_text_alone(
    text_file: Path, plain_tokenizer: Any, load: Any
) -> None:
    """Window i is ids[i * T : (i + 1) * T]."""
    ids = plain_tokenizer(text_file.read_text(), add_special_tokens=False).input_ids
    count = len(ids) // 16

    got = load(text_file, samples=count + 7, tokenizer=plain_tokenizer, order="sequential")

    assert got.ids.tolist() == [ids[i * 16 : (i + 1) * 16] for i in range(count)]
    assert got.notes == (
        f"general.txt: only {count} of {count + 7} windows: the data has {len(ids)} tokens",
    )


def test_random_windows_are_drawn_from_the_sequential_ones_without_repetition(
    text_file: Path, load: Any
) -> None:
    """Every random window is a sequential one, and none comes twice."""
    every = {tuple(row) for row in load(text_file, samples=10_000, order="sequential").ids}

    drawn = [tuple(row) for row in load(text_file, samples=20).ids]

    assert len(set(drawn)) == 20
    assert set(drawn) <= every


def test_the_same_seed_gives_the_same_hash_and_another_seed_another(
    text_file: Path, load: Any
) -> None:
    """The hash stands for the tokens; a seed of any size is taken."""
    hashes = [load(text_file, seed=seed).sha256 for seed in (3, 3, 4, 2**40)]

    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_drawing_is_pinned_across_versions() -> None:
    """The permutation of a seed is part of what a recipe promises."""
    assert draw(10, 0).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]


def test_line_ends_and_a_byte_order_mark_do_not_change_the_windows(
    tmp_path: Path, load: Any
) -> None:
    """CRLF files read as text files do everywhere."""
    text = "ba ce\n\n di fo\n" * 40
    paths = [tmp_path / name for name in ("unix.txt", "windows.txt", "mac.txt")]
    paths[0].write_bytes(text.encode())
    paths[1].write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    paths[2].write_bytes(text.replace("\n", "\r").encode())

    assert len({load(path, order="sequential").sha256 for path in paths}) == 1


def test_a_bos_at_the_start_of_the_text_is_not_counted_twice(
    text_file: Path, tmp_path: Path, load: Any
) -> None:
    """A text that begins with a literal BOS gives the windows of the text without it."""
    marked = tmp_path / "marked.txt"
    marked.write_text("<|begin|>" + text_file.read_text())

    got = load(marked, order="sequential")

    assert got.ids.tolist() == load(text_file, order="sequential").ids.tolist()
    assert got.notes == ("marked.txt: the text itself begins with <|begin|>: not counted twice",)


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n ", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_refused(tmp_path: Path, load: Any, content: bytes) -> None:
    """Empty and white files have one clear line."""
    path = tmp_path / "empty.txt"
    path.write_bytes(content)

    with pytest.raises(
        CalibrationError, match=r"empty\.txt is empty: it holds no text; name a file"
    ):
        load(path)


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path, load: Any) -> None:
    """The message says how many tokens there are and how many are needed."""
    path = tmp_path / "short.txt"
    path.write_text("x y")

    with pytest.raises(CalibrationError, match=r"too short: it has 3 tokens and a window needs 16"):
        load(path)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path, load: Any) -> None:
    """Line, byte and offset are named."""
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\ntwo caf\xe9\n")

    with pytest.raises(CalibrationError, match=r"latin\.txt:2: not UTF-8 text \(byte 0xe9 at"):
        load(path)


def test_a_missing_file_suggests_the_nearest_name(text_file: Path, load: Any) -> None:
    """A misspelt name is answered with the one that exists."""
    with pytest.raises(CalibrationError, match=r"no data file .*; did you mean 'general\.txt'\?"):
        load(text_file.with_name("genral.txt"))


def test_a_file_in_a_missing_folder_names_the_folder(tmp_path: Path, load: Any) -> None:
    """The first part of the path that is wrong is what the user hears about."""
    with pytest.raises(CalibrationError, match="there is no folder"):
        load(tmp_path / "nowhere" / "general.txt")


@pytest.mark.parametrize(
    "name", ["general", "./general", "../data/general", "a\0b", "x" * 5000, "org/name:conf ig", ""]
)
def test_a_name_that_is_neither_file_nor_dataset_is_refused(load: Any, name: str) -> None:
    """Names that the system itself refuses end in one clear line too."""
    with pytest.raises(CalibrationError, match="no data file or folder"):
        load(name)


@pytest.mark.parametrize(
    ("name", "hint"), [("a.json", "rename it to .jsonl"), ("a.csv", "'.csv'"), ("a", "''")]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, load: Any, name: str, hint: str) -> None:
    """The endings that are read are listed."""
    (tmp_path / name).write_text("text")

    with pytest.raises(CalibrationError, match=r"data files end in \.txt, \.jsonl, \.parquet") as e:
        load(tmp_path / name)
    assert hint in str(e.value)


def test_an_unreadable_file_is_refused(tmp_path: Path, load: Any) -> None:
    """A dangling link stands for what exists and cannot be read."""
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")

    with pytest.raises(CalibrationError, match="no data file or folder"):
        load(tmp_path / "loop.txt")


def test_assistant_only_is_refused_for_plain_text(text_file: Path, load: Any) -> None:
    """A plain text has no assistant."""
    with pytest.raises(CalibrationError, match="assistant_only needs rows with 'messages'"):
        load(text_file, assistant_only=True)


@pytest.mark.parametrize("changes", [{"samples": 0}, {"sequence_length": 1}])
def test_impossible_sizes_are_refused(text_file: Path, load: Any, changes: dict[str, int]) -> None:
    """No windows, or windows without a second token, are an error of the caller."""
    with pytest.raises(CalibrationError, match="at least 1 window of 2 tokens"):
        load(text_file, **changes)


def test_a_relative_path_is_read_from_the_working_folder(
    text_file: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`general.txt` alone is enough."""
    monkeypatch.chdir(text_file.parent)

    assert load("general.txt").sha256 == load(text_file).sha256
