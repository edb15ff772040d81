"""What the header of a GGUF file is made of: typed metadata and the descriptions of tensors.

Format: docs/gguf.md of ggml, as gguf.cpp of llama.cpp (build 11549) reads it. A file is the magic,
a version, the number of tensors and of metadata entries, the entries (key, kind, value), the
descriptions of the tensors (name, dimensions with the columns first, type, offset), and after
padding the tensors' bytes, each padded to a multiple of the alignment. All of it is little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from quantkit.ggml_types import GGML_TYPES, GgmlType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_NAME_BYTES = 63
"""Of a tensor's name: ggml keeps 64 with the zero at the end."""
MAX_DIMENSIONS = 4
MAX_PARTS = 65535
"""The number of files of a model is an uint16."""
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
STRING, ARRAY = "string", "array"

NUMBERS: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        "uint8": np.dtype("u1"),
        "int8": np.dtype("i1"),
        "uint16": np.dtype("<u2"),
        "int16": np.dtype("<i2"),
        "uint32": np.dtype("<u4"),
        "int32": np.dtype("<i4"),
        "uint64": np.dtype("<u8"),
        "int64": np.dtype("<i8"),
        "float32": np.dtype("<f4"),
        "float64": np.dtype("<f8"),
        "bool": np.dtype("?"),
    }
)
"""Kinds of metadata that are numbers, as they lie in the file."""

KIND_IDS: Mapping[str, int] = MappingProxyType(
    {
        "uint8": 0,
        "int8": 1,
        "uint16": 2,
        "int16": 3,
        "uint32": 4,
        "int32": 5,
        "float32": 6,
        "bool": 7,
        STRING: 8,
        ARRAY: 9,
        "uint64": 10,
        "int64": 11,
        "float64": 12,
    }
)
"""Kind of a metadata value -> its number in the file."""

# Sizes are those of ggml-common.h. What has a scale for each few weights counts as quantized.
_OTHERS = (
    GgmlType("Q8_1", 9, 32, 36, 32),
    GgmlType("Q8_K", 15, 256, 292, 256),
    GgmlType("IQ2_XXS", 16, 256, 66, 32),
    GgmlType("IQ2_XS", 17, 256, 74, 16),
    GgmlType("IQ3_XXS", 18, 256, 98, 32),
    GgmlType("IQ1_S", 19, 256, 50, 32),
    GgmlType("IQ3_S", 21, 256, 110, 32),
    GgmlType("IQ2_S", 22, 256, 82, 16),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
    GgmlType("IQ1_M", 29, 256, 56, 16),
    GgmlType("TQ1_0", 34, 256, 54, 256),
    GgmlType("TQ2_0", 35, 256, 66, 256),
    GgmlType("MXFP4", 39, 32, 17, 32),
    GgmlType("NVFP4", 40, 64, 36, 16),
    GgmlType("Q1_0", 41, 128, 18, 128),
    GgmlType("Q2_0", 42, 64, 18, 64),
)

TYPES_BY_ID: Mapping[int, GgmlType] = MappingProxyType(
    {kind.id: kind for kind in (*GGML_TYPES.values(), *_OTHERS)}
)
"""Every type whose size is known: those of `GGML_TYPES`, and those that are only listed."""

REMOVED_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
"""Types that llama.cpp had once and refuses now."""


@dataclass(frozen=True)
class Value:
    """One metadata value: `Value("uint32", 5)`, `Value("string", "llama")`."""

    kind: str
    """A name of `KIND_IDS`, other than `array`."""
    content: bool | int | float | str


@dataclass(frozen=True, eq=False)
class Array:
    """A metadata array: `Array("string", ["a", "b"])`, `Array("float32", scores)`."""

    kind: str
    """Of each item."""
    content: Sequence[str] | Sequence[int] | Sequence[float] | NDArray[np.generic]

    def __len__(self) -> int:
        return len(self.content)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return self.kind == other.kind and self.items == other.items

    __hash__ = None  # type: ignore[assignment]

    @property
    def items(self) -> list[bool | int | float | str]:
        """The items as Python's own numbers or strings."""
        content = self.content
        return content.tolist() if isinstance(content, np.ndarray) else list(content)


MetadataValue = Value | Array


@dataclass(frozen=True)
class GgufSpec:
    """A tensor that a file will hold."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    """In Hugging Face's order, columns last; the file turns it round."""

    @property
    def rows(self) -> int:
        """Rows of `row_bytes` bytes each."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row.

        Raises:
            ValueError: the columns are not whole blocks.
        """
        return self.kind.row_bytes(self.shape[-1] if self.shape else 1)

    @property
    def size(self) -> int:
        """Bytes of the tensor, without padding."""
        return self.rows * self.row_bytes


def pad(size: int, alignment: int = ALIGNMENT) -> int:
    """Return `size` rounded up to a multiple of `alignment`."""
    return size + -size % alignment


def name_part(name: str, position: int, count: int) -> str:
    """Return the file name of part `position`, counted from 0, as llama.cpp composes it."""
    if count == 1:
        return f"{name}.gguf"
    return f"{name}-{position + 1:05d}-of-{count:05d}.gguf"
