"""SentencePiece's own file, tokenizer.model, for checkpoints that have no tokenizer.json.

It is a protocol buffer (`ModelProto` in sentencepiece_model.proto of SentencePiece 0.2): pieces
with score and kind, and how text is normalized. The few fields that llama.cpp needs are read here,
with every length checked against the file, so that no package is needed. BPE becomes
`tokenizer.ggml.model` = llama and a unigram model t5; both have the scores that llama.cpp works
with.

What such a tokenizer adds to a text is said in tokenizer_config.json alone; where it is silent, the
defaults are those of Llama's and T5's tokenizers: a BOS for BPE, an EOS for a unigram model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, unreadable
from quantkit.formats.gguf.tokenizer_vocabulary import (
    Token,
    TokenKind,
    Vocabulary,
    added_tokens,
    place_tokens,
)
from quantkit.varints import read_varint

UNIGRAM, BPE = 1, 2
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class PieceModel:
    """What a tokenizer.model holds."""

    kind: int
    """`UNIGRAM` or `BPE`."""
    pieces: tuple[Token, ...]
    normalization: str
    """Name of the rule, such as `identity` or `nmt_nfkc`."""
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_piece_model(path: Path) -> PieceModel:
    """Return what a tokenizer.model holds.

    Raises:
        CheckpointError: the file is damaged, or of a kind that llama.cpp has no algorithm for.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    pieces: list[Token] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _read_fields(memoryview(content)):
            if field == _PIECES:
                pieces.append(_read_piece(value))
            elif field == _TRAINER:
                trainer.update(_read_fields(value))
            elif field == _NORMALIZER:
                normalizer.update(_read_fields(value))
        normalization = bytes(normalizer.get(1, b"")).decode()
        charsmap = bytes(normalizer.get(2, b""))
    except (ValueError, TypeError, struct.error, IndexError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model or is damaged") from error
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE) or not pieces:
        raise CheckpointError(
            f"{path}: llama.cpp runs unigram and BPE models of SentencePiece only"
        )
    return PieceModel(
        kind=kind,
        pieces=tuple(pieces),
        normalization=normalization,
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def read_model_vocabulary(
    model: PieceModel, config: Mapping[str, Any], extra: Mapping[str, int], vocab_size: int
) -> Vocabulary:
    """Return the vocabulary of a SentencePiece model.

    Args:
        model: the pieces.
        config: tokenizer_config.json, whose `added_tokens_decoder` goes before `extra`.
        extra: added_tokens.json, text to id.
        vocab_size: rows of the embedding.

    Raises:
        CheckpointError: the added tokens are damaged, or llama.cpp would abort at the vocabulary.
    """
    base = dict(enumerate(model.pieces))
    try:
        entries = [{"id": id_, "content": text, "special": False} for text, id_ in extra.items()]
        for id_, entry in config.get("added_tokens_decoder", {}).items():
            entries.append({**entry, "id": int(id_)})
        added = added_tokens({"added_tokens": entries})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "tokenizer_config.json or added_tokens.json: an added token is not a text with its id"
        ) from error
    # The token for unknown text stays one, though it is listed as special as well.
    added = {
        id_: token
        for id_, token in added.items()
        if id_ not in base or base[id_].kind is not TokenKind.UNKNOWN
    }
    tokens, notes = place_tokens(base, added, vocab_size)
    if model.kind == UNIGRAM:
        return Vocabulary(
            model="t5",
            pre="default",
            tokens=tokens,
            has_scores=True,
            add_space_prefix=model.add_dummy_prefix,
            remove_extra_whitespaces=model.remove_extra_whitespaces,
            charsmap=model.charsmap,
            notes=notes,
        )
    _check_bytes(model)
    if model.charsmap or model.remove_extra_whitespaces:
        notes += (
            f"SentencePiece normalizes text (rule {model.normalization}, extra blanks "
            f"{'removed' if model.remove_extra_whitespaces else 'kept'}) and llama.cpp does not "
            "for BPE: text that this changes gets other tokens",
        )
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        has_scores=True,
        add_space_prefix=model.add_dummy_prefix,
        notes=notes,
    )


def _check_bytes(model: PieceModel) -> None:
    if sum(token.kind is TokenKind.BYTE for token in model.pieces) != 256:
        raise CheckpointError(
            "tokenizer.model: a BPE model without a token for each byte (byte_fallback) makes "
            "llama.cpp abort on characters that it does not hold"
        )


def _read_piece(content: memoryview) -> Token:
    fields = dict(_read_fields(content))
    return Token(
        text=bytes(fields[1]).decode() if 1 in fields else "",
        kind=TokenKind(fields.get(3, 1)),
        score=float(fields.get(2, 0.0)),
    )


def _read_fields(content: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield field number and value: int, float, or the bytes of a text or an inner message."""
    place = 0
    while place < len(content):
        tag, place = read_varint(content, place)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, place = read_varint(content, place)
            yield field, value
            continue
        if wire == _BYTES:
            length, place = read_varint(content, place)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if length > len(content) - place:
            raise ValueError("a field is longer than the file")
        inner = content[place : place + length]
        place += length
        yield field, struct.unpack("<f", inner)[0] if wire == _FIXED32 else inner
