"""Tokenizers as SentencePiece stores them, which GGUF files are made of: protobuf."""

from __future__ import annotations

from pathlib import Path

from quantkit.formats.gguf.tokenizer import read_tokenizer
from tests.fuzzing.damage import BYTES, append, insert, set_number
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_json


def _build(folder: Path) -> None:
    # The library that trains them is loaded where it is needed alone.
    from tests.formats.gguf.trained_tokenizers import write_sentencepiece

    write_sentencepiece(folder / "bpe")


def _read(folder: Path) -> object:
    return read_tokenizer(folder, 700)


READERS = (
    Reader(
        name="sentencepiece",
        build=_build,
        damages={
            "tokenizer.model": (
                *[set_number(within=20_000, widths=(1, 4))] * 6,
                *(insert, append, *BYTES),
            ),
            "tokenizer_config.json": (*[damage_json] * 20, *BYTES),
        },
        read=_read,
    ),
)
