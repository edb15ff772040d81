"""SentencePiece's BPE (Llama-2, Mistral, Gemma): `tokenizer.ggml.model` = llama.

llama.cpp merges here by score: of all neighbours that form a token it joins those whose token has
the highest score. tokenizer.json holds merges instead. Both give the same tokens when

- every way of cutting a token into two tokens is among the merges,
- the merges of one token follow one another, so that a token has one rank (runs of one character
  aside, see `_rank_blocks`).

That is how SentencePiece's models become a tokenizer.json, and the score is then minus the rank.
(llama.cpp's converter writes -1000 for every token where it has no tokenizer.model.) Merges that
were trained in another way go to `gpt2` with the pre-tokenizer `sarvam-moe`, which is a BPE by
merges over the same pieces; it has no blank before the text, so tokenizers with one are refused.

Source: `llm_tokenizer_spm_session` and `llm_tokenizer_bpe_session` in src/llama-vocab.cpp of
llama.cpp (build 11549).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.formats.gguf.pre_tokenizers import normalizers, recognise_ids
from quantkit.formats.gguf.tokenizer_vocabulary import (
    META_SPACE,
    Token,
    TokenKind,
    Vocabulary,
    added_tokens,
    check_plain_merges,
    note_greedy,
    place_tokens,
    read_merges,
    write_merges,
)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MERGED_MODELS = {
    "gemma4": ("gemma4", "gemma4"),
    "sarvam-moe": ("gpt2", "sarvam-moe"),
    "granite-embed-multi-311m": ("gpt2", "granite-embed-multi-311m"),
}
"""Published tokenizers over pieces that llama.cpp runs by their merges: model and pre-tokenizer."""


def read_pieces(tree: Mapping[str, Any], check_ids: Sequence[int], vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a BPE over SentencePiece's pieces.

    Args:
        tree: tokenizer.json as the loaded tokenizer has it.
        check_ids: the ids of `CHECK_TEXT`.
        vocab_size: rows of the embedding.

    Raises:
        CheckpointError: llama.cpp would give other tokens, or cannot hold the vocabulary.
    """
    model = tree["model"]
    check_plain_merges(model)
    _check_bytes(model)
    prefix, notes = read_blanks(tree)
    added = added_tokens(tree)
    merges = read_merges(model)
    name = recognise_ids(check_ids)
    ranks = None if name in _MERGED_MODELS else rank_pieces(model, merges, added)
    base = _base_tokens(model, ranks or {})
    unknown = next((id_ for id_, token in base.items() if token.kind is TokenKind.UNKNOWN), None)
    if unknown is not None:
        added.pop(unknown, None)
    tokens, lost = place_tokens(base, added, vocab_size)
    notes += lost + note_greedy(tree)
    _check_cuts(tree, [left + right for left, right in merges])
    if ranks is not None:
        return Vocabulary("llama", "default", tokens, (), True, prefix, None, b"", notes)
    _check_merging(merges, prefix)
    kind, pre = _MERGED_MODELS.get(str(name), ("gpt2", "sarvam-moe"))
    return Vocabulary(kind, pre, tokens, write_merges(merges), True, False, None, b"", notes)


def read_blanks(tree: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a blank goes before the text, and notes on what llama.cpp does otherwise.

    Raises:
        CheckpointError: a normalizer that llama.cpp has no counterpart for.
    """
    prefixed, unlike = False, []
    marked = bool(pre_tokenizer_parts(tree, "Metaspace"))
    for part in normalizers(tree):
        match part:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefixed = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                marked = True
            case {"type": "NFC" | "NFKC" | "Precompiled" as kind}:
                unlike.append(kind)
            case _:
                raise CheckpointError(
                    "tokenizer.json: llama.cpp has no counterpart for the normalizer "
                    f"{str(part)[:200]}"
                )
    if not marked:
        raise CheckpointError(
            "tokenizer.json: neither over bytes nor with blanks written as SentencePiece does "
            "(U+2581); llama.cpp has no algorithm for such a BPE"
        )
    notes: tuple[str, ...] = ()
    if unlike:
        notes = (
            f"the Hugging Face tokenizer normalizes text ({', '.join(unlike)}) and llama.cpp does "
            "not: text that this changes gets other tokens",
        )
    if prefixed:
        return True, notes
    scheme = next(
        (part.get("prepend_scheme") for part in pre_tokenizer_parts(tree, "Metaspace")), "never"
    )
    if scheme != "never":
        where = "only at the beginning" if scheme == "first" else "in the same places"
        notes += (
            "llama.cpp puts a blank before the text and after each special token, even before "
            f"another blank; the Hugging Face tokenizer {where} and not before another",
        )
    return scheme != "never", notes


def pre_tokenizer_parts(tree: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """Return the parts of tokenizer.json's pre-tokenizer of one type."""
    pre_tokenizer = tree.get("pre_tokenizer") or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [part for part in parts if part.get("type") == kind]


def rank_pieces(
    model: Mapping[str, Any], merges: Sequence[tuple[str, str]], added: Mapping[int, Token]
) -> dict[str, int] | None:
    """Return the rank of each merged token; None where ranks do not describe the merges.

    Added tokens are left out: llama.cpp finds them before it merges.
    """
    vocab: Mapping[str, int] = model["vocab"]
    places: dict[str, list[int]] = {}
    for place, (left, right) in enumerate(merges):
        if vocab.get(left + right) not in added:
            places.setdefault(left + right, []).append(place)
    ranks = _rank_blocks(merges, places)
    if ranks is None:
        return None
    known = set(merges)
    reachable = {piece for piece in vocab if len(piece) == 1} | set(ranks)
    for piece, id_ in vocab.items():
        if id_ in added or _BYTE.fullmatch(piece):
            continue
        for cut in range(1, len(piece)):
            parts = piece[:cut], piece[cut:]
            if parts[0] in reachable and parts[1] in reachable and parts not in known:
                return None
    return ranks


def _rank_blocks(
    merges: Sequence[tuple[str, str]], places: Mapping[str, Sequence[int]]
) -> dict[str, int] | None:
    """Rank tokens by the place of their merges; those with merges among one another are equal.

    SentencePiece's runs of one character (blanks, line breaks) have one score, so their merges are
    mixed, those with the longer left part first. There both ways grow the leftmost run as far as it
    goes. Any other mixture cannot be ranked.
    """
    blocks: list[list[str]] = []
    end = -1
    for piece, found in places.items():
        if found[0] > end:
            blocks.append([])
        blocks[-1].append(piece)
        end = max(end, found[-1])
    for block in blocks:
        if len(block) == 1:
            continue
        if any(len(set(piece)) > 1 for piece in block):
            return None
        lengths = [len(merges[place][0]) for place in sorted(p for x in block for p in places[x])]
        if lengths != sorted(lengths, reverse=True):
            return None
    return {piece: rank for rank, block in enumerate(blocks) for piece in block}


def _base_tokens(model: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[int, Token]:
    base = {}
    for text, id_ in model["vocab"].items():
        if text == model.get("unk_token"):
            base[int(id_)] = Token(text, TokenKind.UNKNOWN)
        elif _BYTE.fullmatch(text):
            base[int(id_)] = Token(text, TokenKind.BYTE)
        else:
            # Single characters are never the result of a merge: their score is not looked at.
            base[int(id_)] = Token(text, TokenKind.NORMAL, -float(ranks.get(text, len(ranks))))
    return base


def _check_bytes(model: Mapping[str, Any]) -> None:
    missing = next((b for b in range(256) if f"<0x{b:02X}>" not in model["vocab"]), None)
    if missing is not None or not model.get("byte_fallback", False):
        raise CheckpointError(
            "tokenizer.json: a vocabulary of pieces without a token for each byte (byte_fallback) "
            "makes llama.cpp abort on characters that it does not hold"
        )


def _check_cuts(tree: Mapping[str, Any], pieces: Sequence[str]) -> None:
    """Refuse a pre-tokenizer that cuts the text before the merges, which llama.cpp does not do.

    Raises:
        CheckpointError: it cuts where a token could reach over the cut.
    """
    pre_tokenizer = tree.get("pre_tokenizer")
    for part in (
        () if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    ):
        match part:
            case {"type": "Metaspace"}:
                if not part.get("split", True):
                    continue
                if not any(META_SPACE in piece[1:] for piece in pieces):
                    continue
            # The normalizer has left no blank at which this could cut.
            case {"type": "Split", "pattern": {"String": " "}} if normalizers(tree):
                continue
        raise CheckpointError(
            "tokenizer.json: its pre-tokenizer cuts the text before the merges "
            f"({str(part)[:200]}) and llama.cpp does not: it would give other tokens"
        )


def _check_merging(merges: Sequence[tuple[str, str]], prefix: bool) -> None:
    """Refuse merges that llama.cpp's BPE over pieces would do in another way.

    It cuts the text before and after line breaks and nowhere else.
    """
    pieces = (left + right for left, right in merges)
    if prefix:
        reason = "a blank goes before the text, which llama.cpp has for SentencePiece's merges only"
    elif any("\n" in piece and piece.strip("\n") for piece in pieces):
        reason = "merges go over line breaks"
    else:
        return
    raise CheckpointError(
        "tokenizer.json: the merges are not SentencePiece's (not every cut of a token is one of "
        f"them) and {reason}: llama.cpp would give other tokens"
    )
