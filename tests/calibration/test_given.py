"""Windows from what a caller iterates over: every kind of example, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.calibration.given import collect_windows
from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import CalibrationError
from quantkit.records import TokenWindows
from tests.helpers import pico_text, write_pico_tokenizer

TURNS = [
    {"role": "user", "content": "ba ce di"},
    {"role": "assistant", "content": "fo gu ha je"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of the pico models."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_pico_tokenizer(folder)
    return load_tokenizer(folder)


def collect(examples: Any, tokenizer: Any = None, **changes: Any) -> TokenWindows:
    """Four windows of eight tokens, for a model with 300 embeddings."""
    wanted = {"samples": 4, "sequence_length": 8, "text_column": "text", "vocabulary": 300}
    return collect_windows(examples, tokenizer=tokenizer, **(wanted | changes))


def test_ids_are_taken_as_they_are_and_no_more_than_needed() -> None:
    """An endless iterator is read until the windows are full."""
    taken: list[int] = []

    def count() -> Iterator[list[int]]:
        for number in itertools.count(3):
            taken.append(number)
            yield [number % 300] * 3

    windows = collect(count())
    expected = np.repeat(np.arange(3, 14), 3)[:32].reshape(4, 8)
    assert (windows.ids == expected).all()
    assert len(taken) == 11
    assert windows.source == "an iterator of the caller"
    assert (windows.weights == 1).all()


def test_texts_and_rows_and_chats_are_tokenised_as_those_of_files(tokenizer: Any) -> None:
    """A text begins with the BOS that the tokenizer puts there, once."""
    text = pico_text(30, seed=1)
    windows = collect([text], tokenizer)
    assert (windows.ids.reshape(-1)[:8] == tokenizer(text).input_ids[:8]).all()
    assert (collect([{"body": text}], tokenizer, text_column="body").ids == windows.ids).all()
    chats = collect([{"messages": TURNS}] * 8, tokenizer, assistant_only=True)
    assert 0 < chats.weights.sum() < chats.weights.size


def test_batches_of_a_loader_lose_their_padding() -> None:
    """Where attention_mask is 0 a token is left out, on either side."""
    ids = torch.arange(3, 43).reshape(4, 10)
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, 8:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    windows = collect(loader)
    assert (windows.ids.reshape(-1) == ids[mask == 1].numpy()[:32]).all()
    assert (collect([ids]).ids.reshape(-1) == np.arange(3, 35)).all()


def test_the_same_examples_have_the_same_hash() -> None:
    """So that a job goes on with them, and with no others."""
    examples = [[number] * 4 for number in range(3, 20)]
    assert collect(examples).sha256 == collect(iter(examples)).sha256
    assert collect(examples).sha256 != collect(examples[1:]).sha256


def fails_after_one() -> Iterator[list[int]]:
    """A data set whose file goes missing on the way."""
    yield [3, 4, 5]
    raise OSError("the shard is gone")


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ("notes.txt", "pass an iterable of examples"),
        ({"input_ids": [1]}, "pass an iterable of examples"),
        (7, "of type int: pass an iterable"),
        ([], "gave no examples"),
        ([[3, 4]], "too short: it has 2 tokens and a window needs 8"),
        ([[3] * 40, [3, 300]], "^$"),
        ([[3, 300] * 20], "example 1 has the id 300, and the model has 300 embeddings"),
        ([[3] * 4, [3, -100]], "example 2 has the id -100"),
        ([[0.5] * 40], "must be whole numbers"),
        ([["a", "b"]], "must be whole numbers"),
        ([[[3, 4], [5]]], "rows of different lengths"),
        ([torch.ones(8)], "must be whole numbers"),
        ([None], "example 1 is of type NoneType: expected a text, a list of token ids"),
        ([{"input_ids": [3, 4], "attention_mask": [1]}], "has the shape"),
        (["ba ce di"], "is text and there is no tokenizer"),
        ([{"text": "ba ce di"}], "is text and there is no tokenizer"),
        ([{"txt": "ba"}], "neither 'text' nor 'messages'"),
        (fails_after_one(), "raised OSError after 1 examples: the shard is gone"),
        (itertools.repeat([]), "the last 10,000 examples"),
    ],
)
def test_what_is_wrong_is_said_of_the_example(examples: Any, message: str) -> None:
    """By its number, and with what was expected. An id that is not reached is not looked at."""
    if message == "^$":
        assert len(collect(examples).ids) == 4
        return
    with pytest.raises(CalibrationError, match=message):
        collect(examples)


def test_ids_do_not_say_what_the_assistant_wrote() -> None:
    """So they are refused rather than weighed alike."""
    with pytest.raises(CalibrationError, match="assistant_only needs rows with 'messages'"):
        collect([[3] * 40], assistant_only=True)


def test_fewer_windows_than_wanted_are_noted() -> None:
    """As for files."""
    windows = collect([[3, 4, 5, 6] * 4])
    assert len(windows.ids) == 2
    assert "only 2 of 4 windows" in windows.notes[0]
