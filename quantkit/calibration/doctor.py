"""Is the data sane: how much there is, what its special tokens say, does it leak into the test.

Letters of shapes: N windows, T tokens of a window.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from quantkit.calibration.windows import Cut
from quantkit.errors import CalibrationError
from quantkit.records import TokenWindows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_INPUT = 10
"""A second moment of I inputs is noisy below about 10 * I tokens."""

SHINGLE = 32
"""Consecutive tokens that texts do not share by chance."""

MAX_SHARED = 0.01
"""Share of the evaluation's shingles that calibration may have seen."""


def check_amount(
    cut: Cut, name: str, samples: int, sequence_length: int, in_features: int | None
) -> list[str]:
    """Refuse data that does not fill one window, and note where there is less than asked for.

    Raises:
        CalibrationError: there is no whole window.
    """
    count = len(cut.ids)
    if not count:
        raise CalibrationError(
            f"{name} is too short: it has {cut.tokens} tokens and a window needs "
            f"{sequence_length}; give more text or lower sequence_length"
        )
    notes = []
    if count < samples:
        notes.append(f"only {count} of {samples} windows: the data has {cut.tokens} tokens")
    counted = int(np.count_nonzero(cut.weights))
    if in_features is not None and counted < TOKENS_PER_INPUT * in_features:
        notes.append(
            f"{counted} tokens count, fewer than {TOKENS_PER_INPUT} for each of the "
            f"{in_features} inputs of the widest layer: its statistics are noisy"
        )
    return notes


def check_special_tokens(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Note the share of padding and of unknown tokens in ids [N, T], and a BOS counted twice."""
    notes = []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for word, special in (("padding", tokenizer.pad_token_id), ("unknown", tokenizer.unk_token_id)):
        # Many models use their EOS to pad, and GPT-2 has one token for all purposes.
        if special is None or special in (bos, eos):
            continue
        count = int(np.count_nonzero(ids == special))
        if count:
            notes.append(
                f"{word} tokens ({tokenizer.convert_ids_to_tokens(special)}): {count}, "
                f"{count / ids.size:.2%} of all"
            )
    if bos is not None:
        twice = int(np.count_nonzero((ids[:, 0] == bos) & (ids[:, 1] == bos)))
        if twice:
            notes.append(
                f"windows that begin with {tokenizer.bos_token} twice: {twice} (the data has it)"
            )
    return notes


def check_vocabulary(windows: TokenWindows, vocab_size: int) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        CalibrationError: an id is not below `vocab_size`.
    """
    largest = int(windows.ids.max())
    if largest >= vocab_size:
        raise CalibrationError(
            f"{windows.source}: the tokenizer gives the id {largest} and the model has "
            f"{vocab_size} embeddings: the tokenizer is not this model's"
        )


def check_overlap(calibration: TokenWindows, evaluation: TokenWindows) -> tuple[str, ...]:
    """Refuse an evaluation on what calibration has seen; return notes on small overlaps.

    Runs of `SHINGLE` consecutive tokens inside a window are compared (shorter runs where windows
    are shorter). Each distinct run counts once, so that a system prompt that all chats share
    weighs little.

    Raises:
        CalibrationError: both are the same data, or share more than `MAX_SHARED` of the
            evaluation's runs.
    """
    if _is_same(calibration, evaluation):
        raise CalibrationError(
            f"calibration and evaluation use the same data ({evaluation.source}): the verdict "
            "would be flattered; give gate.data a text that calibration has not seen"
        )
    length = min(SHINGLE, calibration.ids.shape[1], evaluation.ids.shape[1])
    seen = np.unique(hash_shingles(calibration.ids, length))
    tested = hash_shingles(evaluation.ids, length)
    distinct = np.unique(tested)
    shared = np.intersect1d(distinct, seen, assume_unique=True)
    if not len(shared):
        return ()
    share = len(shared) / len(distinct)
    windows = int(np.isin(tested, shared).any(axis=1).sum())
    found = (
        f"{share:.2%} of the evaluation's runs of {length} tokens are in the calibration data "
        f"too, in {windows} of {len(tested)} windows"
    )
    if share > MAX_SHARED:
        raise CalibrationError(
            f"{found} ({evaluation.source}, {calibration.source}): at most {MAX_SHARED:.0%} may; "
            "give gate.data a text that calibration has not seen"
        )
    return (found,)


def hash_shingles(ids: np.ndarray, length: int) -> np.ndarray:
    """Return a hash of each run of `length` tokens inside each window, uint64 [N, T - length + 1].

    A polynomial in mixed ids modulo 2**64: equal runs have equal hashes, and a million different
    ones collide with a chance of about 1e-7.
    """
    mixed = _mix(ids.astype(np.uint64))
    count = ids.shape[1] - length + 1
    hashes = np.zeros((len(ids), count), dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + mixed[:, offset : offset + count]
    return _mix(hashes)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values evenly (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _is_same(calibration: TokenWindows, evaluation: TokenWindows) -> bool:
    if evaluation.sha256 == calibration.sha256 or evaluation.source == calibration.source:
        return True
    paths = (calibration.source, evaluation.source)
    return all(map(os.path.exists, paths)) and os.path.samefile(*paths)
