"""A vocabulary as a GGUF file holds it: one text, kind and score for each row of the embedding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from quantkit.errors import CheckpointError

META_SPACE = "\u2581"
"""What SentencePiece writes for a blank."""


class TokenKind(Enum):
    """`llama_token_type` of llama.h; SentencePiece counts in the same way."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Token:
    """One token; `score` is what SentencePiece's algorithms rank by."""

    text: str
    kind: TokenKind = TokenKind.NORMAL
    score: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer, and what llama.cpp's algorithm for it needs to know."""

    model: str
    """`tokenizer.ggml.model`: gpt2, llama, t5 or gemma4."""
    pre: str
    """`tokenizer.ggml.pre`."""
    tokens: tuple[Token, ...]
    merges: tuple[str, ...] = ()
    has_scores: bool = False
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes = b""
    """SentencePiece's compiled normalization, `tokenizer.ggml.precompiled_charsmap`."""
    notes: tuple[str, ...] = ()
    """Where llama.cpp is known to differ from the Hugging Face tokenizer, a sentence each."""


def added_tokens(tree: Mapping[str, Any]) -> dict[int, Token]:
    """Return the tokens that tokenizer.json adds to its model's vocabulary.

    Some checkpoints forget to mark control tokens as special; those that look it are taken for it,
    as llama.cpp's converter does (`does_token_look_special` in conversion/base.py). A blank that is
    written in SentencePiece's way becomes a plain one, since llama.cpp looks for user-defined
    tokens before it normalizes.
    """
    found = {}
    for added in tree.get("added_tokens", ()):
        text = str(added["content"])
        if added.get("special", False) or _looks_special(text):
            found[int(added["id"])] = Token(text, TokenKind.CONTROL, -1000.0)
        else:
            text = text.replace(META_SPACE, " ")
            found[int(added["id"])] = Token(text, TokenKind.USER_DEFINED, -1000.0)
    return found


def _looks_special(text: str) -> bool:
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def place_tokens(
    base: Mapping[int, Token], added: Mapping[int, Token], vocab_size: int
) -> tuple[tuple[Token, ...], tuple[str, ...]]:
    """Return a token for each row of the embedding, and notes on what has no row.

    Rows without a token, with which embeddings are padded, become the unused `[PADn]`.

    Raises:
        CheckpointError: a token of the base vocabulary has no row, or two rows have one text, at
            which llama.cpp aborts.
    """
    beyond = sorted(id_ for id_ in base if id_ >= vocab_size and id_ not in added)
    if beyond:
        raise CheckpointError(
            f"tokenizer.json has token {base[beyond[0]].text!r} as {beyond[0]}, but the embedding "
            f"has {vocab_size} rows: the tokenizer is not this model's"
        )
    tokens = tuple(
        added.get(row) or base.get(row) or Token(f"[PAD{row}]", TokenKind.UNUSED, -10000.0)
        for row in range(vocab_size)
    )
    _check_distinct(tokens)
    lost = [token.text for row, token in sorted(added.items()) if row >= vocab_size]
    if not lost:
        return tokens, ()
    listed = ", ".join(map(repr, lost[:5])) + (" ..." if len(lost) > 5 else "")
    return tokens, (f"added tokens without a row in the embedding are left out: {listed}",)


def note_greedy(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on added tokens that take the blanks beside them, or whole words alone."""
    greedy = [
        repr(token["content"])
        for token in tree.get("added_tokens", ())
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    ]
    if not greedy:
        return ()
    listed = ", ".join(greedy[:5]) + (" ..." if len(greedy) > 5 else "")
    return (
        f"added tokens with lstrip, rstrip or single_word ({listed}): llama.cpp knows none of "
        "these, so blanks beside them stay in the text",
    )


def _check_distinct(tokens: Sequence[Token]) -> None:
    zero = next((token.text for token in tokens if "\0" in token.text), None)
    if zero is not None:
        raise CheckpointError(
            f"token {zero!r} holds a zero character, at which llama.cpp takes it to end"
        )
    text, count = Counter(token.text for token in tokens).most_common(1)[0]
    if count > 1:
        rows = [row for row, token in enumerate(tokens) if token.text == text]
        raise CheckpointError(
            f"the tokens {rows[:4]} are all written {text!r} in a GGUF file, which llama.cpp "
            "refuses to load; remove or rename the added token in tokenizer.json"
        )


def check_plain_merges(model: Mapping[str, Any]) -> None:
    """Refuse a BPE model with parts that llama.cpp has no counterpart for.

    Raises:
        CheckpointError: word prefixes, word suffixes or dropout.
    """
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise CheckpointError(
                f"tokenizer.json: model.{key} is {model[key]!r}, which llama.cpp cannot do"
            )


def read_merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs in their order, from either way of writing them in tokenizer.json."""
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((str(left), str(right)))
    return merges


def write_merges(merges: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the pairs as GGUF has them: two texts with a blank between.

    Raises:
        CheckpointError: a part holds a blank itself.
    """
    for left, right in merges:
        if " " in left or " " in right:
            raise CheckpointError(
                f"tokenizer.json: the merge of {left!r} and {right!r} holds a blank, which a GGUF "
                "file cannot write"
            )
    return tuple(f"{left} {right}" for left, right in merges)
