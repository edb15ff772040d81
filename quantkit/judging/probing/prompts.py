"""The prompts that both models answer: those that come with quantkit, or a file of the user's.

A file has one JSON object a line: {"text": ...}, the beginning of a text, or {"messages": [...]}, a
conversation that the chat template renders and the model answers; "json": true where the answer is
to be JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.calibration.sources import MESSAGES, Columns, make_row, read_text
from quantkit.calibration.templates import apply_template
from quantkit.calibration.tokenizer import encode
from quantkit.errors import CalibrationError, nearest
from quantkit.recipe import shipped_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = "calib_data/probes.jsonl"
"""From the folder that holds the shipped recipes."""

TEXT, JSON = "text", "json"

WINDOW_PROMPTS = 8
WINDOW_TOKENS = 32
"""Prompts that are made of windows, and their longest beginning."""


@dataclass(frozen=True)
class Prompt:
    """Token ids that both models continue. `where` names it in messages."""

    where: str
    ids: tuple[int, ...]
    wants_json: bool = False


@dataclass(frozen=True)
class Prompts:
    """What is asked; `notes` say what was left out, one sentence each."""

    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()


def load_prompts(
    file: str | None, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, longest: int
) -> Prompts:
    """Read a file of prompts and turn them into ids, as a program that serves the model does.

    The tokenizer puts its BOS before a text; of a conversation the chat template writes all
    special tokens, asks for an answer and, where it knows `enable_thinking`, for one without
    thoughts, so that short answers have room. Conversations are left out where there is no
    template, and shipped prompts that it refuses or that do not fit.

    Args:
        file: a .jsonl file; None: the one that comes with quantkit.
        tokenizer: the baseline's.
        vocabulary: tokens that the model has.
        longest: tokens of a prompt, at the most.

    Raises:
        CalibrationError: the file or a line of it is bad, or one of the user's prompts too long or
            refused by the template.
    """
    path = shipped_folder().parent / SHIPPED if file is None else Path(file)
    label = "the shipped prompts" if file is None else path.name
    found: list[Prompt] = []
    left_out: Counter[str] = Counter()
    for where, tree in _read_lines(path):
        if MESSAGES in tree and not tokenizer.chat_template:
            left_out["conversations, and the tokenizer has no chat template"] += 1
            continue
        try:
            ids = _encode(tokenizer, tree, where)
        except CalibrationError:
            if file is not None:
                raise
            left_out["conversations that the chat template refuses"] += 1
            continue
        if ids and max(ids) >= vocabulary:
            left_out["of tokens that the model does not have"] += 1
        elif len(ids) <= longest:
            found.append(Prompt(where, ids, bool(tree.get(JSON, False))))
        elif file is None:
            left_out[f"longer than the {longest} tokens that the model has room for"] += 1
        else:
            raise CalibrationError(
                f"{where}: the prompt has {len(ids)} tokens, and {longest} fit before the answer: "
                "shorten it, or lower gate.probes.max_new_tokens"
            )
    notes = (f"{label}: {count} left out, which are {why}" for why, count in left_out.items())
    return Prompts(tuple(found), tuple(notes))


def check_prompts(file: str | None) -> None:
    """Refuse a bad file of prompts before any work is done.

    Raises:
        CalibrationError: it cannot be read, or a line of it is bad.
    """
    if file is None:
        return
    try:
        _read_lines(Path(file))
    except CalibrationError as error:
        raise CalibrationError(f"gate.probes.prompts: {error}") from error


def make_window_prompts(ids: np.ndarray, longest: int) -> Prompts:
    """Return the beginnings of a few windows [N, T], spread evenly, in place of prompts."""
    length = min(WINDOW_TOKENS, ids.shape[1] // 2, longest)
    chosen = np.unique(np.linspace(0, len(ids) - 1, num=min(WINDOW_PROMPTS, len(ids))).astype(int))
    return Prompts(
        tuple(Prompt(f"window {index}", tuple(ids[index, :length].tolist())) for index in chosen),
        ("no tokenizer reads the prompts: the models continued the evaluation windows instead",),
    )


def _read_lines(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (file:line, row) of each line that is not blank.

    Raises:
        CalibrationError: the file cannot be read, or a line is no such row.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).split(":")[0]
            raise CalibrationError(
                f"{where}: not valid JSON: {reason}; a prompt is one JSON object on one line"
            ) from None
        _check_row(tree, where)
        rows.append((where, tree))
    return rows


def _check_row(tree: object, where: str) -> None:
    known = (TEXT, MESSAGES, JSON)
    if not isinstance(tree, dict):
        raise CalibrationError(
            f'{where}: a prompt is a JSON object like {{"text": ...}}, not a {type(tree).__name__}'
        )
    for key in tree:
        if key not in known:
            raise CalibrationError(
                f"{where}: the key {key!r} is unknown{nearest(key, known)} "
                f"(known: {', '.join(known)})"
            )
    if (TEXT in tree) == (MESSAGES in tree):
        raise CalibrationError(f"{where}: a prompt has either {TEXT!r} or {MESSAGES!r}")
    if not isinstance(tree.get(JSON, False), bool):
        raise CalibrationError(f"{where}: {JSON!r} is true or false, not {tree[JSON]!r}")
    make_row(tree, Columns(TEXT, messages_only=MESSAGES in tree), where)
    if TEXT in tree and not tree[TEXT].strip():
        raise CalibrationError(f"{where}: the text is empty: give it a beginning to go on from")


def _encode(
    tokenizer: PreTrainedTokenizerBase, tree: Mapping[str, Any], where: str
) -> tuple[int, ...]:
    if TEXT in tree:
        return tuple(encode(tokenizer, tree[TEXT], special=True, where=where).ids.tolist())
    text = render_chat(tokenizer, tree[MESSAGES], where)
    return tuple(encode(tokenizer, text, special=False, where=where).ids.tolist())


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    where: str,
    *,
    asks: bool = True,
    thinks: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Render a conversation with the chat template.

    Args:
        tokenizer: has a template.
        messages: with `role` and `content`.
        where: names the conversation in messages.
        asks: whether the model is to answer now.
        thinks: whether it may think before, where the template can tell it not to.
        tools: that the model may call, as functions in JSON schema.

    Raises:
        CalibrationError: the template refuses it.
        CheckpointError: the template takes too much time or memory.
    """
    options = {
        "tools": tools,
        "tokenize": False,
        "add_generation_prompt": asks,
        "enable_thinking": thinks,
    }
    what = f"{where}: the chat template refuses it"
    return str(apply_template(tokenizer, messages, options, what))
