"""Which texts an encoder sees, and what is said of those that it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.data import check_shared_texts, load_rows, make_batches
from quantkit.encoders.entries import split_sentences
from quantkit.encoders.model import describe_encoder
from quantkit.errors import CalibrationError
from quantkit.records.encoders import EncoderInfo, TextRows
from tests.encoder_models import encoder_sentences, write_encoder_checkpoint


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder_checkpoint(tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    return write_encoder_checkpoint(folder, "BertForSequenceClassification")


def _info(folder: Path) -> EncoderInfo:
    return describe_encoder(open_checkpoint(resolve_source(str(folder))))


def _load(folder: Path, data: Path, **changes: Any) -> TextRows:
    arguments: dict[str, Any] = {
        "split": "train",
        "text_column": "text",
        "pair_column": None,
        "label_column": None,
        "samples": 100,
        "sequence_length": 64,
        "seed": 0,
        "order": "sequential",
    } | changes
    return load_rows(data, tokenizer=load_tokenizer(folder), info=_info(folder), **arguments)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _texts(folder: Path, rows: TextRows) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows.ids]


def test_a_text_is_taken_apart_into_sentences() -> None:
    text = "One, e.g. this.  Two is it? Yes!\nThree\n\n---\nVersion 3.1 it is. One, e.g. this.\n"
    assert split_sentences(text) == [
        "One, e.g. this.",
        "Two is it?",
        "Yes!",
        "Three",
        "Version 3.1 it is.",
    ]
    assert split_sentences("\u4f60\u597d\u3002\u6211\u5728\u3002") == [
        "\u4f60\u597d\u3002",
        "\u6211\u5728\u3002",
    ]


def test_ids_are_those_of_the_tokenizer(embedding: Path, tmp_path: Path) -> None:
    sentences = encoder_sentences(5)
    rows = _load(embedding, _write(tmp_path / "d.jsonl", [{"text": text} for text in sentences]))
    tokenizer = load_tokenizer(embedding)
    assert rows.ids == tuple(tuple(tokenizer(text).input_ids) for text in sentences)
    assert rows.labels == rows.pairs == ()
    assert rows.notes == ("d.jsonl: only 5 of 100 texts",)


def test_samples_are_drawn_by_seed_for_calibration(embedding: Path, tmp_path: Path) -> None:
    data = _write(tmp_path / "d.jsonl", [{"text": text} for text in encoder_sentences(40)])
    first, again, other = (
        _load(embedding, data, samples=10, seed=seed, order="random") for seed in (0, 0, 1)
    )
    assert len(first.ids) == 10
    assert first == again
    assert first.sha256 == again.sha256 != other.sha256
    assert set(first.ids) != set(other.ids)
    assert _load(embedding, data, samples=10).ids == _load(embedding, data).ids[:10]


def test_what_is_cut_or_left_out_is_noted(embedding: Path, tmp_path: Path) -> None:
    texts = ["a word", "", "a word", " \n", "many words " * 100]
    rows = _load(embedding, _write(tmp_path / "d.jsonl", [{"text": text} for text in texts]))
    assert len(rows.ids) == 2
    assert len(rows.ids[1]) == 64
    assert rows.ids[1][-1] == rows.ids[0][-1], "the special token at the end stays"
    assert {note.removeprefix("d.jsonl: ") for note in rows.notes} >= {
        "only 2 of 100 texts",
        "empty rows that were left out: 2",
        "texts that were there before and count once: 1",
        "texts longer than 64 tokens, which were cut: 1",
    }


def test_no_text_is_longer_than_the_model_takes(embedding: Path, tmp_path: Path) -> None:
    data = _write(tmp_path / "d.jsonl", [{"text": "many words " * 100}])
    rows = _load(embedding, data, sequence_length=4000)
    assert len(rows.ids[0]) == _info(embedding).max_length


def test_a_classifier_reads_a_pair_as_one_row(classifier: Path, tmp_path: Path) -> None:
    first, second = encoder_sentences(2)
    data = _write(tmp_path / "d.jsonl", [{"text": first, "other": second, "label": "good"}])
    rows = _load(classifier, data, pair_column="other", label_column="label")
    expected = load_tokenizer(classifier)(first, second)
    assert rows.ids == (tuple(expected["input_ids"]),)
    assert rows.type_ids == (tuple(expected["token_type_ids"]),)
    assert rows.labels == (2.0,)
    assert rows.pairs == ()


def test_an_embedding_model_reads_the_texts_of_a_pair_apart(
    embedding: Path, tmp_path: Path
) -> None:
    one, two, three = encoder_sentences(3)
    data = _write(
        tmp_path / "d.jsonl",
        [
            {"text": one, "other": two, "score": 0.5},
            {"text": one, "other": three, "score": 4},
            {"text": one, "other": two, "score": 1},
            {"text": two, "other": "", "score": 1},
            {"text": three, "other": two, "score": None},
        ],
    )
    rows = _load(embedding, data, pair_column="other", label_column="score")
    assert len(rows.ids) == 3
    assert rows.pairs == ((0, 1), (0, 2))
    assert rows.labels == (0.5, 4.0)
    assert {note.removeprefix("d.jsonl: ") for note in rows.notes} == {
        "only 2 of 100 pairs",
        "empty rows that were left out: 1",
        "rows without a label that were left out: 1",
        "texts that were there before and count once: 1",
        "of these with another label, of which the first counts: 1",
    }


@pytest.mark.parametrize(("label", "expected"), [("fair", 1.0), (2, 2.0), (0.0, 0.0)])
def test_labels_are_names_or_numbers(
    label: Any, expected: float, classifier: Path, tmp_path: Path
) -> None:
    data = _write(tmp_path / "d.jsonl", [{"text": "a word", "label": label}])
    assert _load(classifier, data, label_column="label").labels == (expected,)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("goood", "'goood' is none of the model's .* did you mean 'good'"),
        (3, "numbered from 0 to 2"),
        (0.5, "is no class"),
        ([1], "is no class"),
    ],
)
def test_other_labels_are_refused(
    label: Any, message: str, classifier: Path, tmp_path: Path
) -> None:
    data = _write(tmp_path / "d.jsonl", [{"text": "a word", "label": label}])
    with pytest.raises(CalibrationError, match=rf"d\.jsonl:1: the label .*{message}|{message}"):
        _load(classifier, data, label_column="label")


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"text": "a", "other": 3}, {"pair_column": "other"}, "'other' is of type int"),
        ({"text": "a"}, {"pair_column": "other"}, "no column 'other'"),
        ({"text": "a", "label": 1}, {"label_column": "label"}, "name the column of the second"),
        ({"txt": "a"}, {}, "set text_column"),
        ({"text": " "}, {}, "has no text"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "an encoder reads texts"),
        ({"text": "half \ud800"}, {}, "surrogate"),
    ],
)
def test_unfit_rows_are_refused(
    row: dict[str, Any], changes: dict[str, Any], message: str, embedding: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=message):
        _load(embedding, _write(tmp_path / "d.jsonl", [row]), **changes)


def test_a_plain_text_has_no_columns(embedding: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("A text.")
    with pytest.raises(CalibrationError, match=r"is a plain text, and 'other' is a column"):
        _load(embedding, tmp_path / "d.txt", pair_column="other")


def test_labels_of_tokens_are_refused(tmp_path: Path) -> None:
    folder = write_encoder_checkpoint(tmp_path / "m", "BertForTokenClassification")
    data = _write(tmp_path / "d.jsonl", [{"text": "a", "label": [1]}])
    with pytest.raises(CalibrationError, match="labels of tokens are not read"):
        _load(folder, data, label_column="label")


def test_columns_of_parquet_files_are_read(classifier: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"x": [1, 2], "text": ["one", "two"], "y": ["bad", "good"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    rows = _load(classifier, tmp_path / "d.parquet", label_column="y")
    assert _texts(classifier, rows) == ["one", "two"]
    assert rows.labels == (0.0, 2.0)


def test_a_text_without_tokens_counts_as_empty(tmp_path: Path) -> None:
    """A tokenizer that adds nothing has none for a text of signs that it strips."""
    folder = write_encoder_checkpoint(tmp_path / "m")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text()) | {"post_processor": None}
    path.write_text(json.dumps(tokenizer))
    data = _write(tmp_path / "d.jsonl", [{"text": "\u200b\ufffd"}, {"text": "a text"}])
    rows = _load(folder, data)
    assert _texts(folder, rows) == ["a text"]
    assert any("empty rows that were left out: 1" in note for note in rows.notes)
    with pytest.raises(CalibrationError, match="has no text"):
        _load(folder, _write(tmp_path / "e.jsonl", [{"text": "\u200b"}]))


def test_batches_hold_every_text_once_and_little_padding(embedding: Path, tmp_path: Path) -> None:
    data = _write(tmp_path / "d.jsonl", [{"text": text} for text in encoder_sentences(50)])
    rows, info = _load(embedding, data), _info(embedding)
    seen: list[int] = []
    for numbers, inputs in make_batches(rows, info, 200):
        seen += numbers
        assert tuple(inputs) == info.inputs
        assert {array.dtype for array in inputs.values()} == {np.dtype(np.int64)}
        assert inputs["input_ids"].size <= 200
        for place, number in enumerate(numbers):
            length = len(rows.ids[number])
            assert tuple(inputs["input_ids"][place, :length]) == rows.ids[number]
            assert (inputs["input_ids"][place, length:] == info.pad_id).all()
            assert inputs["attention_mask"][place].sum() == length
    assert sorted(seen) == list(range(len(rows.ids)))
    assert all(len(numbers) == 1 for numbers, _ in make_batches(rows, info, 1))


def test_texts_in_calibration_and_evaluation_are_refused(embedding: Path, tmp_path: Path) -> None:
    texts = encoder_sentences(220)
    parts = {"a": texts[:100], "b": texts[100:], "c": texts[99:], "d": texts[97:]}
    rows = {
        name: _load(
            embedding,
            _write(tmp_path / f"{name}.jsonl", [{"text": text} for text in part]),
            samples=500,
        )
        for name, part in parts.items()
    }
    assert check_shared_texts(rows["a"], rows["b"]) == ()
    assert "1 of the evaluation's 121 texts" in check_shared_texts(rows["a"], rows["c"])[0]
    with pytest.raises(CalibrationError, match="3 of the evaluation's 123 texts"):
        check_shared_texts(rows["a"], rows["d"])
    with pytest.raises(CalibrationError, match="use the same data"):
        check_shared_texts(rows["a"], _load(embedding, tmp_path / "a.jsonl", samples=20))
