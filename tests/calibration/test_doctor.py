"""The doctor's checks: amount, special tokens, vocabulary and leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibration.doctor import check_overlap, check_vocabulary, hash_shingles
from quantkit.calibration.windows import hash_windows
from quantkit.errors import CalibrationError
from quantkit.records import TokenWindows
from tests.helpers import pico_text


def make_windows(ids: np.ndarray, source: str) -> TokenWindows:
    ids = ids.astype(np.int64)
    weights = np.ones(ids.shape, dtype=np.float32)
    return TokenWindows(ids, weights, source, hash_windows(ids, weights))


def random_windows(seed: int, count: int = 20, length: int = 96) -> TokenWindows:
    ids = np.random.default_rng(seed).integers(0, 1000, (count, length))
    return make_windows(ids, f"source {seed}")


def shared_share(calibration: np.ndarray, evaluation: np.ndarray, length: int) -> float:
    """Share of distinct runs, counted the slow way."""

    def runs(ids: np.ndarray) -> set[tuple[int, ...]]:
        return {
            tuple(row[start : start + length])
            for row in ids.tolist()
            for start in range(len(row) - length + 1)
        }

    tested = runs(evaluation)
    return len(tested & runs(calibration)) / len(tested)


def test_disjoint_data_passes_without_a_note() -> None:
    """Random tokens share no run of 32."""
    assert check_overlap(random_windows(1), random_windows(2)) == ()


def test_a_small_overlap_is_a_note_with_its_share() -> None:
    """One run of 32 in 1300 is below one in a hundred."""
    calibration, evaluation = random_windows(1), random_windows(2)
    evaluation.ids[3, 10:42] = calibration.ids[7, 50:82]
    share = shared_share(calibration.ids, evaluation.ids, 32)

    (note,) = check_overlap(calibration, evaluation)

    assert 0 < share < 0.01
    assert note == (
        f"{share:.2%} of the evaluation's runs of 32 tokens are in the calibration data too, "
        "in 1 of 20 windows"
    )


def test_a_large_overlap_is_refused_with_its_share() -> None:
    """Two windows of twenty that calibration has seen are too many."""
    calibration, evaluation = random_windows(1), random_windows(2)
    evaluation.ids[:2] = calibration.ids[5:7]

    with pytest.raises(CalibrationError, match=r"^10\.00% of .* in 2 of 20 windows \(source 2, s"):
        check_overlap(calibration, evaluation)


def test_an_overlap_is_found_at_any_shift_and_window_length() -> None:
    """The same text cut into windows of other lengths is the same text."""
    stream = np.random.default_rng(0).integers(0, 1000, 4096)
    calibration = make_windows(stream[5 : 5 + 7 * 512].reshape(7, 512), "a")
    evaluation = make_windows(stream.reshape(-1, 64), "b")

    with pytest.raises(CalibrationError, match="of the evaluation's runs of 32 tokens"):
        check_overlap(calibration, evaluation)


def test_the_same_source_is_refused_even_where_the_windows_differ(tmp_path: Path) -> None:
    """One file for both is a mistake whatever was drawn from it, under any of its names."""
    path = tmp_path / "general.txt"
    path.write_text("a")
    (tmp_path / "link.txt").symlink_to(path)
    calibration = make_windows(np.arange(64).reshape(1, 64), str(path))

    for name in (str(path), str(tmp_path / "link.txt")):
        evaluation = make_windows(np.arange(64, 128).reshape(1, 64), name)
        with pytest.raises(CalibrationError, match="calibration and evaluation use the same data"):
            check_overlap(calibration, evaluation)


def test_a_copy_under_another_name_is_refused() -> None:
    """The content counts, not the name."""
    calibration = random_windows(1)

    with pytest.raises(CalibrationError, match="use the same data"):
        check_overlap(calibration, make_windows(calibration.ids, "copy"))


def test_a_prompt_that_all_chats_share_weighs_once() -> None:
    """A system prompt of 33 tokens in every window makes two runs, not forty."""
    calibration, evaluation = random_windows(1), random_windows(2)
    for windows in (calibration, evaluation):
        windows.ids[:, :33] = np.arange(33)

    (note,) = check_overlap(calibration, evaluation)

    assert "in 20 of 20 windows" in note


def test_short_windows_are_compared_by_their_whole_length() -> None:
    """Windows of 8 tokens still tell the same from the different."""
    calibration = random_windows(1, length=8)
    evaluation = random_windows(2, length=16)
    assert check_overlap(calibration, evaluation) == ()
    evaluation.ids[:, 3:11] = calibration.ids

    with pytest.raises(CalibrationError, match="runs of 8 tokens"):
        check_overlap(calibration, evaluation)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 9))
def test_hashes_are_equal_exactly_where_the_runs_are(seed: int, length: int) -> None:
    """Few different tokens make many equal runs; the hashes sort them as a dictionary does."""
    ids = np.random.default_rng(seed).integers(0, 3, (4, 24))
    hashes = hash_shingles(ids, length)
    runs = [
        tuple(row[start : start + length])
        for row in ids.tolist()
        for start in range(24 - length + 1)
    ]

    assert hashes.shape == (4, 24 - length + 1)
    assert len(set(zip(runs, hashes.ravel().tolist(), strict=True))) == len(set(runs))
    assert len(set(hashes.ravel().tolist())) == len(set(runs))


def test_texts_of_their_own_pass_from_file_to_verdict(tmp_path: Path, load: Any) -> None:
    """Two files with different texts go through the whole way without a note."""
    windows = []
    for seed, name in enumerate(("calibration.txt", "evaluation.txt"), 1):
        (tmp_path / name).write_text(pico_text(900, seed))
        windows.append(load(tmp_path / name, samples=16, sequence_length=64))

    assert check_overlap(*windows) == ()


def test_a_text_that_contains_the_evaluation_is_refused(tmp_path: Path, load: Any) -> None:
    """An evaluation text that was pasted into the calibration text is found in the tokens."""
    (tmp_path / "evaluation.txt").write_text(pico_text(300, 1))
    (tmp_path / "calibration.txt").write_text(pico_text(300, 2) + pico_text(300, 1))
    calibration = load(tmp_path / "calibration.txt", samples=1000, sequence_length=64)
    evaluation = load(tmp_path / "evaluation.txt", samples=8, sequence_length=64)

    with pytest.raises(CalibrationError, match=r"in \d of 8 windows"):
        check_overlap(calibration, evaluation)


def test_too_few_tokens_for_the_widest_input_is_a_note(tmp_path: Path, load: Any) -> None:
    """Ten tokens an input are asked for."""
    (tmp_path / "a.txt").write_text(pico_text(200, 1))

    assert load(tmp_path / "a.txt", in_features=6).notes == ()
    (note,) = load(tmp_path / "a.txt", in_features=7).notes
    assert note.startswith("a.txt: 64 tokens count, fewer than 10 for each of the 7 inputs")


def test_padding_inside_the_data_is_noted_with_its_share(
    tmp_path: Path, load: Any, tokenizer: Any
) -> None:
    """Data that was padded before shows; an EOS that also pads is no padding."""
    (tmp_path / "a.txt").write_text("ba<|pad|><|pad|> ce " * 40)

    got = load(tmp_path / "a.txt")
    count = int((got.ids == 2).sum())

    assert got.notes == (f"a.txt: padding tokens (<|pad|>): {count}, {count / 64:.2%} of all",)
    tokenizer.pad_token = tokenizer.eos_token
    assert load(tmp_path / "a.txt").notes == ()


def test_unknown_tokens_are_noted_with_their_share(
    tmp_path: Path, load: Any, tokenizer: Any
) -> None:
    """A tokenizer that does not know the script of the data says so."""
    tokenizer.unk_token = "<|pad|>"
    tokenizer.pad_token = None
    (tmp_path / "a.txt").write_text("ba<|pad|> ce " * 40)

    (note,) = load(tmp_path / "a.txt").notes

    assert note.startswith("a.txt: unknown tokens (<|pad|>): ")


def test_a_second_bos_at_a_windows_start_is_noted(
    tmp_path: Path, load: Any, plain_tokenizer: Any
) -> None:
    """Data that brings two BOS along is not changed, but told."""
    (tmp_path / "a.txt").write_text("<|begin|><|begin|>" + "ba ce " * 40)

    (note,) = load(tmp_path / "a.txt", tokenizer=plain_tokenizer, order="sequential").notes

    assert note == "a.txt: windows that begin with <|begin|> twice: 1 (the data has it)"


def test_ids_beyond_the_embeddings_are_refused() -> None:
    """A tokenizer of another model is found before the forward trips over it."""
    windows = make_windows(np.array([[0, 299], [1, 2]]), "a.txt")

    check_vocabulary(windows, 300)
    with pytest.raises(CalibrationError, match=r"a\.txt: the tokenizer gives the id 299 and the"):
        check_vocabulary(windows, 299)
