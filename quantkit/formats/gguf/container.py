"""The reader of GGUF files: every claim of a header is checked before anything relies on it.

A count, a length or an offset is compared with the bytes that the file has before memory is taken
for it; gguf-py's reader loops for ever on a file of 43 bytes that claims 2**60 entries. What
gguf.cpp and llama-model-loader.cpp of llama.cpp (build 11549) refuse is refused here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.mistaken import recognise_file
from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.cursor import Cursor, opened
from quantkit.formats.gguf.header import (
    ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
    REMOVED_TYPES,
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    TYPES_BY_ID,
    VERSION,
    Array,
    MetadataValue,
    Value,
    name_part,
    pad,
)
from quantkit.ggml_types import GgmlType

PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_OLD_MAGICS = (b"ggml", b"ggmf", b"ggjt", b"ggla", b"lmgg", b"fmgg", b"tjgg", b"algg")
_SMALLEST_ENTRY, _SMALLEST_TENSOR = 13, 24
"""Bytes of the shortest metadata entry and description of a tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `size` bytes from byte `start` of `file`."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    """In Hugging Face's order, columns last."""
    file: Path
    start: int
    size: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.kind.row_bytes(self.shape[-1] if self.shape else 1)

    @property
    def rows(self) -> int:
        """Rows of `row_bytes` bytes each."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file, or of all parts of a split one."""

    path: Path
    """Of the first part."""
    version: int
    alignment: int
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, StoredTensor]
    """In the order of the file."""
    parts: tuple[Path, ...]

    def find(self, key: str) -> bool | int | float | str | None:
        """Return a metadata value that is no array, or None where there is none."""
        value = self.metadata.get(key)
        return value.content if isinstance(value, Value) else None

    def find_text(self, key: str) -> str | None:
        """Return the first 200 letters of a metadata string, or None where there is none."""
        value = self.find(key)
        return value[:200] if isinstance(value, str) else None

    def find_array(self, key: str) -> Array | None:
        """Return a metadata array, or None where there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, Array) else None


def open_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file, and of the other parts where it is split.

    Args:
        path: of the file; of the first part where there are several.

    Raises:
        CheckpointError: a part is missing, cut short, or not what the format says.
    """
    first = _read_part(path)
    count = _find_count(first, SPLIT_COUNT)
    if count <= 1:
        return first
    position = _find_count(first, SPLIT_NUMBER)
    match = PART_NAME.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (position + 1, count):
        raise CheckpointError(
            f"{path} says that it is part {position + 1} of {count}, but its name is not that of "
            f"one: rename it to {name_part('NAME', position, count)}, as the others"
        )
    if position:
        raise CheckpointError(
            f"{path} is part {position + 1} of {count}: name {name_part(match[1], 0, count)}"
        )
    parts = [first]
    for number in range(1, count):
        other = _read_part(join_inside(path.parent, name_part(match[1], number, count)))
        if (_find_count(other, SPLIT_NUMBER), _find_count(other, SPLIT_COUNT)) != (number, count):
            raise CheckpointError(f"{other.path} does not say that it is part {number + 1}")
        parts.append(other)
    return _join(first, parts)


def read_tensor_rows(file: GgufFile, name: str, first: int = 0, count: int | None = None) -> Tensor:
    """Read rows of a tensor as they are stored.

    Args:
        first: row to begin with.
        count: rows to read; None for all that follow.

    Returns:
        uint8 [count, row bytes].

    Raises:
        CheckpointError: there is no such tensor, or its file changed meanwhile.
        ValueError: there are not so many rows.
    """
    tensor = file.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{file.path} has no tensor {name!r}")
    rows = tensor.rows - first if count is None else count
    if first < 0 or rows < 0 or first + rows > tensor.rows:
        raise ValueError(f"tensor {name!r} has {tensor.rows} rows, not {first} + {rows}")
    data = np.empty((rows, tensor.row_bytes), dtype=np.uint8)
    with opened(tensor.file) as (handle, _):
        handle.seek(tensor.start + first * tensor.row_bytes)
        if handle.readinto(data.reshape(-1).data) != data.size:
            raise CheckpointError(f"{tensor.file} ends within tensor {name!r}: it has changed")
    return torch.from_numpy(data)


def _join(first: GgufFile, parts: list[GgufFile]) -> GgufFile:
    """Put the tensors of all parts together."""
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in {tensors[name].file} and in {part.path}"
                )
            tensors[name] = tensor
    stated = _find_count(first, SPLIT_TENSORS)
    if stated != len(tensors):
        raise CheckpointError(
            f"{first.path} says that its {len(parts)} parts have {stated} tensors, they have "
            f"{len(tensors)}: download or write them again"
        )
    return GgufFile(
        path=first.path,
        version=first.version,
        alignment=first.alignment,
        metadata=first.metadata,
        tensors=MappingProxyType(tensors),
        parts=tuple(part.path for part in parts),
    )


def _find_count(part: GgufFile, key: str) -> int:
    value = part.metadata.get(key, Value("uint16", 0))
    content = value.content if isinstance(value, Value) else value
    if type(content) is not int or content < 0:
        raise CheckpointError(f"{part.path}: metadata {key!r} is not a count")
    return content


def _read_part(path: Path) -> GgufFile:
    """Read the header of one file."""
    with opened(path) as (handle, size):
        cursor = Cursor(path, handle, size)
        version, tensor_count, entry_count = _read_start(cursor)
        metadata: dict[str, MetadataValue] = {}
        for _ in range(entry_count):
            at = cursor.position
            key = cursor.read_name("the key of a metadata entry")
            if key in metadata:
                raise cursor.fault(f"metadata {key!r} is given twice", at)
            metadata[key] = cursor.read_value(f"metadata {key!r}")
        alignment = _find_alignment(cursor, metadata)
        found: dict[str, tuple[GgmlType, tuple[int, ...], int]] = {}
        for _ in range(tensor_count):
            at = cursor.position
            name = cursor.read_name("the name of a tensor")
            if name in found:
                raise cursor.fault(f"tensor {name!r} is given twice", at)
            found[name] = _read_description(cursor, name)
    start = pad(cursor.position, alignment) if found else cursor.position
    tensors = _place(path, found, start, alignment, size)
    return GgufFile(
        path, version, alignment, MappingProxyType(metadata), MappingProxyType(tensors), (path,)
    )


def _read_start(cursor: Cursor) -> tuple[int, int, int]:
    """Read magic, version and both counts."""
    magic = cursor.take(4, "the magic")
    if magic in _OLD_MAGICS:
        raise CheckpointError(
            f"{cursor.path} is of the formats that came before GGUF: convert the original again"
        )
    if magic != MAGIC:
        reason = recognise_file(cursor.path) or f"it begins with {magic!r}"
        raise CheckpointError(f"{cursor.path} is not a GGUF file: {reason}")
    version = cursor.read_number("uint32", "the version")
    if version and version & 0xFFFF == 0:
        raise CheckpointError(
            f"{cursor.path} is big-endian, which is not read here: convert it for little-endian "
            f"machines (gguf_convert_endian.py of gguf-py)"
        )
    if version not in (VERSION - 1, VERSION):
        raise CheckpointError(
            f"{cursor.path} is GGUF version {version}; versions 2 and 3 are read: convert the "
            f"original again"
        )
    tensors = cursor.read_count(_SMALLEST_TENSOR, "tensors")
    entries = cursor.read_count(_SMALLEST_ENTRY, "metadata entries")
    return version, tensors, entries


def _find_alignment(cursor: Cursor, metadata: Mapping[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", Value("uint32", ALIGNMENT))
    alignment = value.content if isinstance(value, Value) and value.kind == "uint32" else 0
    if not isinstance(alignment, int) or alignment.bit_count() != 1:
        raise cursor.fault("metadata 'general.alignment' is not an uint32 that is a power of 2")
    return alignment


def _read_description(cursor: Cursor, name: str) -> tuple[GgmlType, tuple[int, ...], int]:
    """Read type, shape and offset of a tensor whose name has been read."""
    where = f"tensor {name!r}"
    if len(name.encode()) > MAX_NAME_BYTES:
        raise cursor.fault(f"{where}: the name is longer than {MAX_NAME_BYTES} bytes")
    dimensions = cursor.read_number("uint32", where)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.fault(f"{where} claims {dimensions} dimensions, more than {MAX_DIMENSIONS}")
    shape = tuple(cursor.read_number("uint64", where) for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise cursor.fault(f"{where} has the shape {list(shape)} and so no weights")
    number = cursor.read_number("uint32", where)
    kind = TYPES_BY_ID.get(number)
    if kind is None:
        fate = "was removed from the format" if number in REMOVED_TYPES else "is not known"
        raise cursor.fault(f"{where} has the type {number}, which {fate}")
    columns = shape[-1] if shape else 1
    if columns % kind.block:
        raise cursor.fault(
            f"{where} has {columns} columns, which are not whole blocks of {kind.block} of "
            f"{kind.name}"
        )
    return kind, shape, cursor.read_number("uint64", where)


def _place(
    path: Path,
    found: Mapping[str, tuple[GgmlType, tuple[int, ...], int]],
    start: int,
    alignment: int,
    size: int,
) -> dict[str, StoredTensor]:
    """Check that tensors follow each other without gaps and end within the file."""
    tensors, expected = {}, 0
    for name, (kind, shape, offset) in found.items():
        if offset != expected:
            fault = "overlaps the one before it" if offset < expected else "follows a gap"
            raise CheckpointError(
                f"{path}: tensor {name!r} {fault} (its offset is {offset}, {expected} is next): "
                f"llama.cpp refuses the file; write it again"
            )
        columns = shape[-1] if shape else 1
        length = math.prod(shape[:-1]) * kind.row_bytes(columns)
        if start + offset + length > size:
            raise CheckpointError(
                f"{path} is cut short: tensor {name!r} ends at byte {start + offset + length} and "
                f"the file has {size}; download or copy it again"
            )
        tensors[name] = StoredTensor(name, kind, shape, path, start + offset, length)
        expected += pad(length, alignment)
    return tensors
