"""All readers that there are cases of, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tests.fuzzing.reader import Reader
from tests.fuzzing.readers import (
    checkpoint,
    data,
    evidence,
    gguf,
    imatrix,
    onnx,
    quantized,
    recipe,
    replies,
    resuming,
    sentencepiece,
    task,
    tokenizer,
)

_ALL: tuple[Reader, ...] = (
    *recipe.READERS,
    *checkpoint.READERS,
    *tokenizer.READERS,
    *gguf.READERS,
    *imatrix.READERS,
    *data.READERS,
    *evidence.READERS,
    *onnx.READERS,
    *quantized.READERS,
    *replies.READERS,
    *resuming.READERS,
    *sentencepiece.READERS,
    *task.READERS,
)

READERS: Mapping[str, Reader] = MappingProxyType({reader.name: reader for reader in _ALL})
