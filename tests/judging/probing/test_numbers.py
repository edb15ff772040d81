"""Tests of quantkit.judging.probing.special and probe_long, on numbers made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from quantkit.judging.probing.logits import Compared
from quantkit.judging.probing.long_context import LongWindows, long_windows, probe_long_context
from quantkit.judging.probing.special import (
    Watched,
    find_places,
    find_watched,
    measure_shifts,
    probe_special_tokens,
)
from quantkit.recipe import GateSpec
from quantkit.recipe.judging import ProbesSpec
from quantkit.records import TokenWindows
from tests.helpers import make_pico_model, write_pico_tokenizer

DRAW = np.random.default_rng(0)
WATCHED = Watched((1, 2), ("<end>", "<turn>"))


def make_logs(size: int, at: int) -> np.ndarray:
    """Log-probabilities [400, 2]: small, and likely at every `at`-th position."""
    logs = DRAW.normal(-14, 2, (400, 2))
    logs[::at] = DRAW.normal(-0.5, 0.2, (len(logs[::at]), 2))
    return logs[:size]


def test_a_special_token_that_is_lost_or_put_everywhere_shows() -> None:
    """Noise of half a nat at each position does not, and the worst token is named."""
    logs = make_logs(400, 20)
    sound = logs + DRAW.normal(0, 0.5, logs.shape)
    lost, flooded = sound.copy(), sound.copy()
    lost[:, 1] = -11.0
    flooded[:, 0] = -2.0

    assert np.abs(measure_shifts(logs, sound)).max() < 0.75
    probe = probe_special_tokens(WATCHED, logs, lost, 1.5)
    assert probe.verdict == "FAIL"
    assert "of 2 special tokens at 400 positions '<turn>' changes most" in probe.detail
    assert "nats less probable" in probe.detail
    rare = make_logs(19, 20)
    rare[0] = -14.0
    assert measure_shifts(rare, np.full_like(rare, -2.0)).min() > 5
    assert probe_special_tokens(WATCHED, logs, sound, 1.5).verdict == "PASS"


def test_a_token_that_neither_model_would_put_counts_for_nothing() -> None:
    """From 1e-13 to 1e-8 is five orders of magnitude, and no reader will ever see it."""
    assert np.abs(measure_shifts(np.full((50, 1), -30.0), np.full((50, 1), -18.0))).max() < 0.01


def test_special_tokens_without_numbers_fail() -> None:
    """A NaN is not small."""
    probe = probe_special_tokens(WATCHED, make_logs(9, 2), np.full((9, 2), np.nan), 1.5)

    assert (probe.value, probe.verdict) == (None, "FAIL")
    assert (
        probe_special_tokens(Watched((), ()), np.zeros((9, 0)), np.zeros((9, 0)), 1).value is None
    )


def test_the_ends_of_generation_come_first(tmp_path: Path) -> None:
    """Then the tokens that were added to the vocabulary; none that the model does not have."""
    from quantkit.calibration.tokenizer import load_tokenizer

    model = make_pico_model(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 999]}))

    watched = find_watched(load_tokenizer(model), model, 300)

    assert watched == Watched((7, 1, 0, 2), ("7", "<|end|>", "<|begin|>", "<|pad|>"))
    assert find_watched(None, model, 300).ids == (7,)


def test_special_tokens_are_looked_at_in_conversations(tmp_path: Path) -> None:
    """A thought where the model has an end of one; what the template refuses is a note."""
    from quantkit.calibration.tokenizer import load_tokenizer

    write_pico_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens(["<think>", "</think>"])
    template = str(tokenizer.chat_template)

    rows, notes = find_places(tokenizer, (), len(tokenizer))
    tokenizer.chat_template = (
        "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + template
    )
    fewer, told = find_places(tokenizer, (), len(tokenizer))
    tokenizer.chat_template = None

    assert (len(rows), notes) == (7, ())
    thought = tokenizer.decode(list(rows[-1]))
    assert thought.endswith("I cannot know it.\n</think>\n\nI do not know.")
    assert tokenizer.decode(list(rows[3])).endswith(f"On the table.{tokenizer.eos_token}\n")
    assert len(fewer) == 6
    assert told == (
        "special tokens were not looked at in a call of a tool: the chat template refuses it: no "
        "tools",
    )
    assert len(find_places(tokenizer, (), len(tokenizer))[0]) == 3


def make_windows(count: int, length: int = 8, *, bos: bool = True) -> TokenWindows:
    """Consecutive windows of the text 1, 2, 3, ..., each after a BOS of 0."""
    body = length - bos
    ids = 1 + np.arange(count * body).reshape(count, body)
    if bos:
        ids = np.concatenate([np.zeros((count, 1), np.int64), ids], axis=1)
    return TokenWindows(ids, np.ones(ids.shape, np.float32), "test", "0" * 64)


def cut(
    windows: TokenWindows, folder: Path, *, asked: int | None = None, **config: int
) -> LongWindows:
    """Long windows of a model with this config."""
    (folder / "config.json").write_text(json.dumps(config))
    return long_windows(windows, ProbesSpec(long_sequence_length=asked), folder)


def test_long_windows_are_windows_of_the_text_end_to_end(tmp_path: Path) -> None:
    """In whatever order the windows come, and with one BOS; four of them, from all of the text."""
    windows = make_windows(40)
    order = DRAW.permutation(40)
    shuffled = TokenWindows(
        windows.ids[order], windows.weights, "test", "0" * 64, numbers=order.astype(np.int64)
    )

    found = cut(shuffled, tmp_path, max_position_embeddings=64)

    assert found.ids is not None
    assert found.ids.shape == (4, 32)
    assert found.ids[0].tolist() == list(range(32))
    for row in found.ids.tolist():
        assert row[1:] == list(range(row[1], row[1] + 31))
    whole = cut(make_windows(40, bos=False), tmp_path, max_position_embeddings=64)
    assert whole.ids is not None
    assert whole.ids[0].tolist() == list(range(1, 33))


def test_long_windows_end_where_the_model_or_the_data_does(tmp_path: Path) -> None:
    """Gaps are not joined; a length that was asked for and cannot be had is a note."""
    windows = make_windows(40)
    short = cut(windows, tmp_path, max_position_embeddings=20)
    none = cut(windows, tmp_path, max_position_embeddings=8)
    asked = cut(windows, tmp_path, asked=16, max_position_embeddings=20)
    few = cut(make_windows(2), tmp_path, asked=100, max_position_embeddings=200)
    gaps = TokenWindows(
        windows.ids[::2], windows.weights[::2], "test", "0" * 64, numbers=np.arange(0, 40, 2)
    )
    alone = cut(gaps, tmp_path, max_position_embeddings=64)

    assert short.ids is not None
    assert short.ids.shape[1] == 19
    assert (none.ids, none.note is not None and "no positions beyond" in none.note) == (None, True)
    assert asked.ids is not None
    assert (asked.ids.shape[1], asked.note) == (16, None)
    assert few.ids is not None
    assert few.ids.shape == (1, 15)
    assert few.note == "long windows have 15 tokens, not 100: the model or the data allows no more"
    assert alone.ids is None
    assert "no two windows that follow each other" in str(alone.note)


@pytest.mark.parametrize(
    ("inside", "beyond", "value", "verdict"),
    [
        (0.04, 0.1, 2.5, "PASS"),
        (0.04, 0.7, 17.5, "FAIL"),
        (1e-6, 0.02, 2.0, "PASS"),
        (0.0, 0.7, 70.0, "FAIL"),
        (0.04, np.nan, None, "FAIL"),
    ],
)
def test_long_context_is_a_multiple_of_what_the_windows_have(
    inside: float, beyond: float, value: float | None, verdict: str
) -> None:
    """Where that is next to nothing, 0.01 nats stand in for it."""
    near = as_compared(np.full((2, 8), inside), np.full((2, 7), 3.0))
    # What the first positions have in the long windows does not count.
    kl = np.full((2, 32), beyond)
    kl[:, :8] = 0.5

    probe = probe_long_context(near, as_compared(kl, np.full((2, 31), 3.0)), 8, 32, 8.0)

    assert probe.value == (None if value is None else pytest.approx(value, rel=1e-5))
    assert probe.verdict == verdict
    assert "does not work" not in probe.detail


@pytest.mark.parametrize(("worse_from", "value"), [(8, None), (16, 2.5), (24, 4.5), (31, 6.5)])
def test_where_the_baseline_itself_does_not_work_nothing_is_lost(
    worse_from: int, value: float | None
) -> None:
    """A model may have more positions than it was trained on; there any change changes much."""
    near = as_compared(np.full((2, 8), 0.04), np.full((2, 7), 3.0))
    kl = np.full((2, 32), 0.1)
    kl[:, 16:] = 0.26
    kl[:, 24:] = 0.42
    nll = np.full((2, 31), 3.2)
    nll[:, worse_from:] = 5.0

    probe = probe_long_context(near, as_compared(kl, nll), 8, 32, 8.0)

    assert probe.value == (None if value is None else pytest.approx(value, rel=1e-5))
    assert probe.verdict == ("UNJUDGED" if value is None else "PASS")
    assert ("does not work" in probe.detail) == (worse_from < 31)


def as_compared(kl: np.ndarray, nll: np.ndarray) -> Compared:
    """What two rows gave, without watched tokens."""
    none = np.zeros((*kl.shape, 0), np.float32)
    return Compared(kl.astype(np.float32), none, none, nll.astype(np.float32))


def test_the_defaults_are_limits() -> None:
    """A recipe that says nothing of probes has them."""
    probes = GateSpec(data="x.txt").probes
    assert probes is not None
    assert None not in (probes.max_new_loops, probes.max_special_shift, probes.max_long_ratio)
