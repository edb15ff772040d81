"""Unigram tokenizers (T5, XLM-R) from tokenizer.json: `tokenizer.ggml.model` = t5.

llama.cpp looks for the most probable sequence of pieces by their scores, as SentencePiece and the
Hugging Face tokenizer do, after SentencePiece's normalization: the compiled rules, a blank before
the text, extra blanks removed. What tokenizer.json says in normalizers and pre-tokenizers has to be
one of these.

Source: `llm_tokenizer_ugm_session` in src/llama-vocab.cpp of llama.cpp (build 11549), and the class
`SpmConverter` of transformers 5, which writes such files.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.formats.gguf.pre_tokenizers import normalizers
from quantkit.formats.gguf.tokenizer_vocabulary import (
    META_SPACE,
    Token,
    TokenKind,
    Vocabulary,
    added_tokens,
    note_greedy,
    place_tokens,
)

_RUNS_OF_BLANKS = frozenset({" {2,}", f"{META_SPACE}{{2,}}", " +", "\\s+", "\\s{2,}"})
"""Patterns that tokenizers' converters write for: extra blanks become one."""


@dataclass(frozen=True)
class _Normalization:
    charsmap: bytes = b""
    removes_blanks: bool = False


def read_unigram(tree: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a Unigram model.

    Args:
        tree: tokenizer.json as the loaded tokenizer has it.
        vocab_size: rows of the embedding.

    Raises:
        CheckpointError: llama.cpp would give other tokens, or cannot hold the vocabulary.
    """
    model = tree["model"]
    if model.get("byte_fallback", False):
        raise CheckpointError(
            "tokenizer.json: a Unigram model with byte_fallback: llama.cpp has tokens for bytes in "
            "BPE models only, and would give <unk> in their place"
        )
    normalization = _read_normalization(tree)
    prefixed, cuts = _read_pre_tokenizer(tree)
    base = _base_tokens(model)
    added = added_tokens(tree)
    unknown = model.get("unk_id")
    # The token for unknown text stays one, though it is listed as special as well.
    added = {id_: token for id_, token in added.items() if id_ != unknown}
    tokens, notes = place_tokens(base, added, vocab_size)
    return Vocabulary(
        model="t5",
        pre="default",
        tokens=tokens,
        has_scores=True,
        add_space_prefix=prefixed,
        remove_extra_whitespaces=normalization.removes_blanks or cuts,
        charsmap=normalization.charsmap,
        notes=notes + note_greedy(tree),
    )


def _base_tokens(model: Mapping[str, Any]) -> dict[int, Token]:
    unknown = model.get("unk_id")
    return {
        id_: Token(
            str(text), TokenKind.UNKNOWN if id_ == unknown else TokenKind.NORMAL, float(score)
        )
        for id_, (text, score) in enumerate(model["vocab"])
    }


def _read_normalization(tree: Mapping[str, Any]) -> _Normalization:
    """Return what llama.cpp has to do with the text.

    Raises:
        CheckpointError: a normalizer that it has no counterpart for.
    """
    charsmap, removes, strips = b"", False, None
    for part in normalizers(tree):
        match part:
            case {"type": "Precompiled", "precompiled_charsmap": str(text)}:
                charsmap = _decode(text)
            case {"type": "Replace", "pattern": {"Regex": regex}, "content": " " | "\u2581"} if (
                regex in _RUNS_OF_BLANKS
            ):
                removes = True
            case {"type": "Strip", "strip_right": True}:
                strips = part
            case _:
                raise _unlike(part)
    if strips is not None and not removes:
        # SentencePiece strips where it removes extra blanks, and only there.
        raise _unlike(strips)
    return _Normalization(charsmap, removes)


def _read_pre_tokenizer(tree: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether a blank goes before the text, and whether white space is cut at and lost.

    Raises:
        CheckpointError: it cuts the text elsewhere.
    """
    pre_tokenizer = tree.get("pre_tokenizer") or {}
    prefixed = cuts = marked = False
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        match part:
            case {"type": "Metaspace", "replacement": "\u2581"}:
                marked = True
                prefixed = part.get("prepend_scheme", "always") != "never"
            case {"type": "WhitespaceSplit"}:
                cuts = True
            case _:
                raise _unlike(part)
    if not marked:
        raise CheckpointError(
            "tokenizer.json: a Unigram model without blanks written as SentencePiece does (U+2581);"
            " llama.cpp has no algorithm for such a one"
        )
    return prefixed, cuts


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise CheckpointError(
            "tokenizer.json: precompiled_charsmap is damaged: not in base64"
        ) from None


def _unlike(part: object) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json: llama.cpp has no counterpart in Unigram models for {str(part)[:200]}"
    )
