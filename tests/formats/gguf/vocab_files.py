"""GGUF files that hold a vocabulary alone, and both tokenizers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.formats.gguf.header import MetadataValue, Value
from quantkit.formats.gguf.tokenizer import read_tokenizer
from quantkit.formats.gguf.writing import write_gguf
from tests.llama_vocab import tokenize_with_llama


def write_vocabulary(folder: Path, vocab_size: int, pre: str | None = None) -> Path:
    """Write the vocabulary of a checkpoint's tokenizer beside it."""
    metadata: dict[str, MetadataValue] = {"general.architecture": Value("string", "llama")}
    metadata.update(read_tokenizer(folder, vocab_size, pre).values)
    write_gguf(folder, "vocabulary", metadata, [], [], 1 << 30)
    return folder / "vocabulary.gguf"


def find_differences(
    folder: Path,
    texts: Sequence[str],
    vocab_size: int,
    *,
    pre: str | None = None,
    add_special: bool = True,
) -> list[tuple[str, list[int], list[int]]]:
    """Return the texts with different ids: (text, Hugging Face's ids, llama.cpp's ids)."""
    tokenizer = load_tokenizer(folder)
    expected = [tokenizer.encode(text, add_special_tokens=add_special) for text in texts]
    found = tokenize_with_llama(
        write_vocabulary(folder, vocab_size, pre), texts, add_special=add_special
    )
    return [
        (text, wanted, got)
        for text, wanted, got in zip(texts, expected, found, strict=True)
        if wanted != got
    ]
