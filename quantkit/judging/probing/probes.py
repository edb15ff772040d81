"""How the artifact behaves beside the baseline: five probes, each with a limit (docs/gate.md).

Letters of shapes: N windows, T tokens of a window, P positions, S watched tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantkit.judging.partings import describe_generations
from quantkit.judging.probing.answers import (
    Answer,
    continue_prompts,
    probe_endings,
    probe_json,
    probe_loops,
)
from quantkit.judging.probing.limits import judge_probe
from quantkit.judging.probing.logits import Compared, compare_rows
from quantkit.judging.probing.long_context import (
    LONG_WINDOWS,
    LongWindows,
    find_positions,
    long_windows,
    probe_long_context,
)
from quantkit.judging.probing.prompts import (
    Prompts,
    check_prompts,
    load_prompts,
    make_window_prompts,
)
from quantkit.judging.probing.special import find_places, find_watched, probe_special_tokens
from quantkit.judging.worker import Pair
from quantkit.recipe.judging import ProbesSpec
from quantkit.records.measuring import Generation, Probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LongWindows", "ProbeFindings", "check_prompts", "long_windows", "run_probes"]

BATCH = 8
"""Rows of similar length that are padded to one."""
SHOWN_TOKENS = 64
"""Of a prompt: its end is shown."""


@dataclass(frozen=True)
class ProbeFindings:
    """What the probes found, in the order of the report."""

    probes: tuple[Probe, ...]
    generations: tuple[Generation, ...]
    """One a prompt, in the order of the prompts."""
    notes: tuple[str, ...]
    """What was left out, and why; one sentence each."""


@dataclass(frozen=True)
class _Models:
    """What every request needs."""

    pair: Pair
    vocabulary: int
    folder: Path


def run_probes(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase | None,
    ids: np.ndarray,
    long_ids: LongWindows,
    vocabulary: int,
    spec: ProbesSpec,
    folder: Path,
    *,
    baseline: Path,
    positions: int | None = None,
) -> ProbeFindings:
    """Let both models answer fixed prompts and read a few texts, and compare what they do.

    Args:
        pair: both workers, loaded and idle.
        tokenizer: the baseline's; None where it has none: beginnings of windows are prompts then.
        ids: evaluation windows, int64 [N, T].
        long_ids: as `long_windows` returns them.
        vocabulary: tokens that both models have.
        spec: limits, and which prompts.
        folder: for files of logits, which are deleted after use.
        baseline: folder of the baseline, whose config files name the ends and the positions.
        positions: tokens of a sequence that both runtimes take; None: they do not say.

    Raises:
        CalibrationError: the file of prompts is missing or damaged.
        CheckpointError: a config file of the baseline is damaged.
        WorkerError, ResourceError: as `Pair.answers`.
    """
    models = _Models(pair, vocabulary, folder)
    positions = find_positions(baseline, positions) or sys.maxsize
    new_tokens = min(spec.max_new_tokens, positions // 2)
    prompts = _find_prompts(spec, tokenizer, ids, vocabulary, positions - new_tokens)
    answers = continue_prompts(pair, prompts.prompts, new_tokens)
    watched = find_watched(tokenizer, baseline, vocabulary)
    places, place_notes = find_places(tokenizer, answers, vocabulary)
    near_rows = ids[:LONG_WINDOWS] if long_ids.ids is None else long_ids.ids[:, : ids.shape[1]]
    near = compare_rows(pair, near_rows, watched.ids, vocabulary, folder)
    seen = [
        *((near.baseline[row], near.artifact[row]) for row in range(len(near_rows))),
        *_read_places(models, places, watched.ids, positions),
    ]
    first, second = (np.concatenate([pair_of[side] for pair_of in seen]) for side in (0, 1))
    return ProbeFindings(
        probes=(
            probe_loops(answers, spec.max_new_loops),
            probe_endings(answers, new_tokens, spec.max_changed_endings, watched.ids),
            probe_json(answers, tokenizer, spec.max_lost_json),
            probe_special_tokens(watched, first, second, spec.max_special_shift),
            _probe_length(models, near, long_ids, spec.max_long_ratio),
        ),
        generations=_show_answers(answers, tokenizer, new_tokens),
        notes=(
            *_note_tokens(new_tokens, spec.max_new_tokens),
            *prompts.notes,
            *place_notes,
            *_note_length(long_ids),
        ),
    )


def _find_prompts(
    spec: ProbesSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    ids: np.ndarray,
    vocabulary: int,
    longest: int,
) -> Prompts:
    if tokenizer is None:
        return make_window_prompts(ids, longest)
    return load_prompts(spec.prompts, tokenizer, vocabulary=vocabulary, longest=longest)


def _read_places(
    models: _Models, places: Sequence[tuple[int, ...]], watched: Sequence[int], positions: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return both models' log-probabilities [P, S] of the watched tokens along each row.

    Rows are padded behind their end, where nothing before it can see the padding.
    """
    ordered = sorted((row[:positions] for row in places), key=len)
    found = []
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        longest = len(part[-1])
        rows = np.array([row + row[-1:] * (longest - len(row)) for row in part], dtype=np.int64)
        compared = compare_rows(models.pair, rows, watched, models.vocabulary, models.folder)
        found += [
            (compared.baseline[number, : len(row)], compared.artifact[number, : len(row)])
            for number, row in enumerate(part)
        ]
    return found


def _probe_length(
    models: _Models, near: Compared, windows: LongWindows, limit: float | None
) -> Probe:
    if windows.ids is None:
        detail = windows.note or "there are no long windows"
        return judge_probe("long_context", None, limit, detail)
    far = compare_rows(models.pair, windows.ids, (), models.vocabulary, models.folder)
    return probe_long_context(near, far, windows.within, windows.ids.shape[1], limit)


def _note_tokens(new_tokens: int, asked: int) -> tuple[str, ...]:
    if new_tokens == asked:
        return ()
    return (
        f"continuations have {new_tokens} tokens, not {asked}: the model has no more positions",
    )


def _note_length(windows: LongWindows) -> tuple[str, ...]:
    """Where there are no long windows at all, the probe says why."""
    return () if windows.ids is None or windows.note is None else (windows.note,)


def _show_answers(
    answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase | None, new_tokens: int
) -> tuple[Generation, ...]:
    """Describe every continuation; nothing can be shown without a tokenizer."""
    if tokenizer is None:
        return ()
    return describe_generations(
        [answer.prompt.ids[-SHOWN_TOKENS:] for answer in answers],
        [answer.baseline for answer in answers],
        [answer.artifact for answer in answers],
        tokenizer,
        most=new_tokens,
    )
