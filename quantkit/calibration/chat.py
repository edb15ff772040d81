"""Chats to token ids through the tokenizer's own chat template, and which ids the assistant wrote.

Only transformers renders templates: it does so in a sandbox, and in a process with bounds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantkit.calibration.templates import Apply, Messages, isolated
from quantkit.calibration.tokenizer import encode, refuse_long
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class EncodedRow:
    """Token ids int64 [L] of one row and their weights float32 [L], 1 where a token counts."""

    ids: np.ndarray
    weights: np.ndarray
    domain: str = ""
    """Its kind of text, where that was asked for."""


def marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks what the assistant writes with `{% generation %}`."""
    template = tokenizer.chat_template
    return isinstance(template, str) and bool(_GENERATION.search(template))


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template can write today's date, so that its ids change from day to day."""
    return "strftime_now" in str(tokenizer.chat_template)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    where: str,
    assistant_only: bool,
    apply: Apply | None = None,
) -> EncodedRow:
    """Render a chat and tokenise it; the template writes all special tokens, the tokenizer none.

    With `assistant_only` a token counts if it begins inside an assistant's turn, the end of turn
    included. Templates that mark the turns are asked; for others each turn is found by comparing
    the rendering with that of the messages up to it.

    Args:
        apply: of `isolated`, for many chats; None: the template has a process for this one.

    Raises:
        CalibrationError: there is no template, it refuses the chat, or a turn cannot be found.
        CheckpointError: the template takes too much time or memory.
    """
    if apply is None:
        with isolated(tokenizer) as own:
            return encode_chat(tokenizer, messages, where, assistant_only, own)
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{where}: a chat row needs a chat template and the model's tokenizer has none; use "
            "rows with text, or put a chat_template.jinja beside the tokenizer"
        )
    if assistant_only and marks_assistant(tokenizer):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        output = apply(messages, options, _refuses(where))
        return EncodedRow(
            np.array(output["input_ids"], dtype=np.int64),
            np.array(output["assistant_masks"], dtype=np.float32),
        )
    text = _render(apply, messages, where)
    refuse_long(text, where)
    encoded = encode(tokenizer, text, special=False, where=where)
    if not assistant_only:
        return EncodedRow(encoded.ids, np.ones(len(encoded.ids), dtype=np.float32))
    if encoded.spans is None:
        raise CalibrationError(
            f"{where}: assistant_only needs a tokenizer that tells character offsets (a "
            "tokenizer.json), or a chat template with {% generation %}"
        )
    begins = encoded.spans[:, 0]
    counts = np.zeros(len(begins), dtype=bool)
    for start, end in find_assistant_turns(apply, messages, text, where):
        counts |= (begins >= start) & (begins < end)
    return EncodedRow(encoded.ids, counts.astype(np.float32))


def find_assistant_turns(
    apply: Apply, messages: Messages, text: str, where: str
) -> list[tuple[int, int]]:
    """Return the characters [start, end) of each assistant's turn in `text`, the whole rendering.

    A turn starts after the header that asks for an answer: where the rendering of the messages
    before it, with that header, stops agreeing with `text`. It ends where the rendering up to and
    including it ends; templates that shorten earlier turns (thinking that is dropped) are
    followed by finding the turn's content and the end of turn after it.

    Raises:
        CalibrationError: a turn is not found.
    """
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _find_start(apply, messages[:index], text, where)
        upto = _render(apply, messages[: index + 1], where)
        end = _find_end(text, start, upto, message.get("content"))
        if start is None or end is None:
            raise CalibrationError(
                f"{where}: cannot tell which tokens of message {index + 1} the assistant wrote, "
                "since the chat template has no {% generation %} and rewrites earlier turns; set "
                "assistant_only: false"
            )
        turns.append((start, end))
    return turns


def _find_start(apply: Apply, earlier: Messages, text: str, where: str) -> int | None:
    if not earlier:
        return 0
    before = _render(apply, earlier, where)
    asked = _render(apply, earlier, where, add_generation_prompt=True)
    if not text.startswith(before):
        return None
    pairs = enumerate(zip(asked, text, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(asked), len(text)))


def _find_end(text: str, start: int | None, upto: str, content: object) -> int | None:
    if text.startswith(upto):
        return len(upto)
    if not isinstance(content, str) or not content.strip():
        return None
    content = content.strip()
    ending = upto[upto.rfind(content) + len(content) :] if content in upto else None
    at = text.find(content, start)
    if ending is None or at < 0 or not text.startswith(ending, at + len(content)):
        return None
    return at + len(content) + len(ending)


def _render(
    apply: Apply, messages: Messages, where: str, add_generation_prompt: bool = False
) -> str:
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    return str(apply(messages, options, _refuses(where)))


def _refuses(where: str) -> str:
    return f"{where}: the chat template refuses this row"
