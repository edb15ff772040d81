"""Byte-level BPE (GPT-2, Llama-3, Qwen, ...): `tokenizer.ggml.model` = gpt2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.formats.gguf.pre_tokenizers import APPROXIMATED, find_pre_tokenizer, normalizers
from quantkit.formats.gguf.tokenizer_vocabulary import (
    Token,
    Vocabulary,
    added_tokens,
    check_plain_merges,
    note_greedy,
    place_tokens,
    read_merges,
    write_merges,
)


def is_byte_level(tree: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json is a BPE over bytes written as letters."""
    if tree["model"]["type"] != "BPE":
        return False
    pre_tokenizer = tree.get("pre_tokenizer") or {}
    parts = [*pre_tokenizer.get("pretokenizers", [pre_tokenizer]), tree.get("decoder") or {}]
    return any(part.get("type") == "ByteLevel" for part in parts)


def read_byte_level(
    tree: Mapping[str, Any], check_ids: Sequence[int], vocab_size: int, pre: str | None
) -> Vocabulary:
    """Return the vocabulary of a byte-level BPE tokenizer.

    Args:
        tree: tokenizer.json as the loaded tokenizer has it.
        check_ids: the ids of `CHECK_TEXT`.
        vocab_size: rows of the embedding.
        pre: the user's choice of the pre-tokenizer.

    Raises:
        RecipeError: `pre` is no name that llama.cpp knows.
        CheckpointError: the pre-tokenizer is not recognised, or the vocabulary cannot be written.
    """
    model = tree["model"]
    check_plain_merges(model)
    name = find_pre_tokenizer(tree, check_ids, pre)
    base = {int(id_): Token(text) for text, id_ in model["vocab"].items()}
    tokens, notes = place_tokens(base, added_tokens(tree), vocab_size)
    notes += note_greedy(tree)
    composing = sorted(str(part["type"]) for part in normalizers(tree))
    if composing:
        notes += (
            f"the Hugging Face tokenizer normalizes text ({', '.join(composing)}) and llama.cpp "
            "does not: text that is not composed already gets other tokens",
        )
    if name in APPROXIMATED:
        notes += (f"pre-tokenizer {name}: {APPROXIMATED[name]}",)
    merges = write_merges(read_merges(model))
    return Vocabulary(model="gpt2", pre=name, tokens=tokens, merges=merges, notes=notes)
