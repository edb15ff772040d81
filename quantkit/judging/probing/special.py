"""Are special tokens as probable as in the baseline (docs/gate.md, "Probes")?

An evaluation text holds few of them, so their rows may be damaged at no cost in its numbers. They
are looked for where a model would put them: at the ends of answers and of conversations.

Letters of shapes: P positions, S watched tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.calibration.tokenizer import encode
from quantkit.errors import CalibrationError
from quantkit.judging.probing.answers import Answer
from quantkit.judging.probing.limits import fail_probe, judge_probe
from quantkit.judging.probing.prompts import render_chat
from quantkit.judging.side_files import find_ends
from quantkit.records.measuring import Probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WATCHED = 64
FAVOURABLE = 16
"""Positions at which a token is looked at: where a model holds it most probable."""
NEGLIGIBLE = 1e-5
"""A probability that is added on both sides: a token that neither model would ever put counts for
nothing."""

CONVERSATIONS: Mapping[str, tuple[Mapping[str, str], ...]] = MappingProxyType(
    {
        "an answer": (
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": "On the table."},
        ),
        "a conversation": (
            {"role": "user", "content": "What is the capital of Italy?"},
            {"role": "assistant", "content": "The capital of Italy is Rome."},
            {"role": "user", "content": "Thank you!"},
            {"role": "assistant", "content": "You are welcome."},
        ),
    }
)
"""Whole ones: behind each answer the end of the turn is near certain."""

QUESTION = "What is the weather in Oslo now? Look it up."
THOUGHT = (
    "<think>\nThe user asks for the weather in Oslo. I cannot know it.\n</think>\n\nI do not know."
)
END_OF_THOUGHT = "</think>"

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather in a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "name of the city"}},
            "required": ["city"],
        },
    },
}

TEXTS = (
    "The file is closed when the block ends, also where an error was raised.\n",
    "Yours sincerely,\nThe editors\n\n",
    "That was the last of them, and so the story ends.\n\nThe End\n",
)
"""Ends of documents."""


@dataclass(frozen=True)
class Watched:
    """Special tokens: their ids [S] and how they are written."""

    ids: tuple[int, ...]
    names: tuple[str, ...]


def find_watched(
    tokenizer: PreTrainedTokenizerBase | None, baseline: Path, vocabulary: int
) -> Watched:
    """Return the tokens at which generation ends, and those that were added to the vocabulary.

    The ends of generation_config.json and config.json and of the tokenizer come first, then the
    added tokens by their ids; at most 64.

    Raises:
        CheckpointError: a config file is damaged.
    """
    ids = sorted(find_ends(baseline))
    names: dict[int, str] = {}
    if tokenizer is not None:
        names = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        ids += [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        ids += sorted(names)
    chosen = [number for number in dict.fromkeys(ids) if 0 <= number < vocabulary][:MAX_WATCHED]
    return Watched(tuple(chosen), tuple(names.get(number, str(number)) for number in chosen))


def find_places(
    tokenizer: PreTrainedTokenizerBase | None, answers: Sequence[Answer], vocabulary: int
) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """Return rows of token ids at whose positions special tokens belong, and notes.

    They are the baseline's answers, whole conversations, a call of a tool, a thought and the ends
    of documents.
    """
    rows = [answer.prompt.ids + answer.baseline for answer in answers]
    notes: list[str] = []
    if tokenizer is not None:
        texts = [(text, True) for text in TEXTS]
        for render in _list_conversations(tokenizer):
            try:
                texts.append((render(), False))
            except CalibrationError as error:
                notes.append(f"special tokens were not looked at in {error}")
        for text, special in texts:
            ids = encode(tokenizer, text, special=special, where="a built-in text").ids
            rows.append(tuple(ids.tolist()))
    rows = [row for row in rows if row and max(row) < vocabulary]
    return rows, tuple(notes)


def _list_conversations(tokenizer: PreTrainedTokenizerBase) -> list[Callable[[], str]]:
    """Return what renders each conversation; nothing without a chat template."""
    if not tokenizer.chat_template:
        return []
    question = [{"role": "user", "content": QUESTION}]
    found: list[Callable[[], str]] = [
        partial(render_chat, tokenizer, [dict(turn) for turn in turns], what, asks=False)
        for what, turns in CONVERSATIONS.items()
    ]
    found.append(partial(render_chat, tokenizer, question, "a call of a tool", tools=[TOOL]))
    if END_OF_THOUGHT in map(str, tokenizer.added_tokens_decoder.values()):
        asked = partial(render_chat, tokenizer, question, "a thought", thinks=True)
        found.append(lambda: asked() + THOUGHT)
    return found


def measure_shifts(baseline: np.ndarray, artifact: np.ndarray) -> np.ndarray:
    """Return by how many nats each token is more probable in the artifact, float64 [S].

    Its mean probabilities are compared over the 16 positions at which the baseline holds it most
    probable, and over those at which the artifact does; the larger change counts. The first sees
    what is lost, the second what is put where it does not belong.

    Args:
        baseline, artifact: log-probabilities [P, S].
    """
    p, q = np.exp(baseline.astype(np.float64)), np.exp(artifact.astype(np.float64))
    shifts = []
    for order in (np.argsort(-p, axis=0), np.argsort(-q, axis=0)):
        first, second = (
            np.take_along_axis(each, order[:FAVOURABLE], axis=0).mean(axis=0) + NEGLIGIBLE
            for each in (p, q)
        )
        shifts.append(np.log(second / first))
    return np.where(np.abs(shifts[0]) >= np.abs(shifts[1]), shifts[0], shifts[1])


def probe_special_tokens(
    watched: Watched, baseline: np.ndarray, artifact: np.ndarray, limit: float | None
) -> Probe:
    """Name the special token whose probability changes most, and by how much.

    Args:
        watched: S tokens.
        baseline, artifact: their log-probabilities [P, S].
        limit: nats, in either direction.
    """
    name = "special_tokens"
    if not watched.ids:
        return judge_probe(name, None, limit, "neither the configs nor the tokenizer name any")
    if not np.isfinite(baseline).all() or not np.isfinite(artifact).all():
        detail = "the logits at which special tokens were looked at are not all finite"
        return fail_probe(name, limit, detail)
    shifts = measure_shifts(baseline, artifact)
    worst = int(np.argmax(np.abs(shifts)))
    size = float(abs(shifts[worst]))
    detail = (
        f"of {len(watched.ids)} special tokens at {len(baseline)} positions "
        f"{watched.names[worst]!r} changes most: it is {size:.2f} nats "
        f"{'more' if shifts[worst] > 0 else 'less'} probable than in the baseline"
    )
    return judge_probe(name, size, limit, detail)
