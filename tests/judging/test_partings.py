"""Tests of quantkit.judging.partings: the places where two models part, in readable words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.judging.partings import (
    describe_parting,
    find_partings,
    show_text,
    show_token,
)
from quantkit.judging.scoring import Means, WindowScore, WorstPosition
from quantkit.records import TokenWindows
from tests.helpers import write_pico_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_pico_tokenizer(folder, vocab=300)
    return load_tokenizer(folder)


def find_id(tokenizer: Any, text: str) -> int:
    """The id of a text that is a single token."""
    (token,) = tokenizer(text, add_special_tokens=False).input_ids
    return int(token)


def make_score(kl: float, position: int = 2) -> WindowScore:
    """A window whose models part at `position`."""
    whole = Means(7, 1.0, 1.0, kl, 1.0)
    worst = WorstPosition(position, 9 * kl, (4, 5), (0.7, 0.2), (5, 4), (0.6, 0.3))
    return WindowScore(whole, kl, 1.0, 0.0, 0.0, (whole,), {}, worst, np.ones(7, np.float32))


def test_the_worst_windows_come_first_and_no_more_than_five() -> None:
    """By their mean, with their numbers in the data and not in the random order."""
    kl = [0.1, 0.7, 0.3, 0.6, 0.2, 0.5, 0.4]
    ids = np.tile(np.arange(8), (7, 1))
    windows = TokenWindows(
        ids, np.ones(ids.shape, np.float32), "test", "", numbers=np.arange(70, 77)
    )

    class Names:
        """The words of a tokenizer whose tokens are numbers."""

        def convert_ids_to_tokens(self, token: int) -> str:
            return str(token)

        def decode(self, ids: list[int], **options: object) -> str:
            return "".join(map(str, ids))

    got = find_partings([make_score(value) for value in kl], windows, Names())  # type: ignore[arg-type]

    assert [parting.kl for parting in got] == [0.7, 0.6, 0.5, 0.4, 0.3]
    assert [parting.window for parting in got] == [71, 73, 75, 76, 72]
    worst = got[0]
    assert (worst.position, worst.position_kl) == (2, pytest.approx(6.3))
    assert (worst.before, worst.actual) == ("012", "3")
    assert [(choice.text, choice.probability) for choice in worst.baseline] == [
        ("4", 0.7),
        ("5", 0.2),
    ]
    assert [choice.text for choice in worst.artifact] == ["5", "4"]


def test_the_text_before_ends_with_the_token_that_both_had_read(tokenizer: Any) -> None:
    """At most 200 characters of it, and the token that came is not in it."""
    text = "".join(f"the cat {number} sat. " for number in range(60))
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
    position = len(ids) - 4
    worst = WorstPosition(position, 1.0, (4,), (0.7,), (5,), (0.6,))

    got = describe_parting(worst, ids, tokenizer, window=3, kl=0.5)

    read = tokenizer.decode(ids[: position + 1])
    assert got.before == read[-200:]
    assert text.startswith(read)
    assert text[len(read) :].startswith(tokenizer.decode(ids[position + 1]))


def test_tokens_can_be_read(tokenizer: Any) -> None:
    """Spaces are visible, control characters escaped, parts of characters the tokenizer's own."""
    assert show_token(find_id(tokenizer, "a"), tokenizer) == "a"
    assert show_token(find_id(tokenizer, " "), tokenizer) == "\N{OPEN BOX}"
    assert show_token(find_id(tokenizer, "\n"), tokenizer) == "\\n"
    assert show_token(find_id(tokenizer, "\x1b"), tokenizer) == "\\x1b"
    pieces = tokenizer("€", add_special_tokens=False).input_ids
    assert len(pieces) == 3
    shown = [show_token(piece, tokenizer) for piece in pieces]
    assert shown == tokenizer.convert_ids_to_tokens(pieces)
    assert all(piece.isprintable() for piece in shown)
    assert show_token(0, tokenizer) == tokenizer.bos_token


def test_an_id_beyond_the_tokenizer_is_shown_as_a_number(tokenizer: Any) -> None:
    """Embeddings are often padded to a round number."""
    assert show_token(len(tokenizer) + 5, tokenizer) == f"<{len(tokenizer) + 5}>"


def test_every_token_of_a_vocabulary_is_printable(tokenizer: Any) -> None:
    """Nothing raw reaches a report."""
    shown = [show_token(token, tokenizer) for token in range(len(tokenizer))]

    assert all(text and text.isprintable() for text in shown)
    assert not any(" " in text for text in shown)


def test_a_piece_that_begins_a_word_shows_its_space() -> None:
    """SentencePiece's decoders drop it at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"\u2581the": 0, "the": 1, "<0xE2>": 2}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

    assert [show_token(token, tokenizer) for token in range(3)] == [
        "\N{OPEN BOX}the",
        "the",
        "<0xE2>",
    ]


def test_text_keeps_its_letters_and_escapes_the_rest() -> None:
    """As Python does; spaces stay what they are."""
    assert show_text("naïve 中文 a\tb\nc\x00\x1b[31m\u202e\U000e0001") == (
        "naïve 中文 a\\tb\\nc\\x00\\x1b[31m\\u202e\\U000e0001"
    )
