"""How much of an ONNX file is structure, before protobuf makes objects of it.

An object takes up to a hundred times the bytes that it has in the file, so a small file could ask
for all memory. Only the contents of tensors may be large: protobuf keeps them as they are.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from quantkit.errors import ArtifactError

MAX_BYTES = 2**31 - 1
"""What protobuf reads as one message; larger models keep their weights beside."""
MAX_STRUCTURE = 64 << 20
"""Bytes of a graph without the contents of its tensors. A decoder of 32 blocks has one megabyte."""
MAX_ENTRIES = 1 << 20
"""Nodes, initializers, inputs and outputs."""

_GRAPH, _NODE, _INITIALIZER, _ATTRIBUTE, _TENSOR = 7, 1, 5, 5, 5
_CONTENTS = frozenset({4, 9, 10})
"""Fields of a tensor whose bytes protobuf copies: float_data, raw_data, double_data."""
_SMALL = 1024
"""Bytes below which an entry is not looked into: all of it counts as structure."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TOP_BYTE = 63


def check_structure(path: Path) -> None:
    """Walk the top of a model and measure it.

    Raises:
        ArtifactError: the file is not a protobuf message, or asks for more memory than a graph may.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size == 0:
        raise ArtifactError(f"{path} is empty")
    if size > MAX_BYTES:
        raise ArtifactError(f"{path} has {size} bytes: protobuf reads {MAX_BYTES} at the most")
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            structure = size - _measure_model(data, path)
        except (IndexError, ValueError):
            raise ArtifactError(f"{path} is cut short, or no ONNX file") from None
    if structure > MAX_STRUCTURE:
        raise ArtifactError(
            f"{path} holds {structure} bytes besides its tensors, {MAX_STRUCTURE} are read"
        )


def _measure_model(data: mmap.mmap, path: Path) -> int:
    """Return the bytes of tensors' contents.

    Raises:
        IndexError, ValueError: the message is damaged.
        ArtifactError: it has too many parts.
    """
    contents = entries = 0
    for field, start, end in _walk(data, 0, len(data)):
        entries += 1
        if field == _GRAPH:
            for part, first, last in _walk(data, start, end):
                entries += 1
                if entries > MAX_ENTRIES:
                    break
                if last - first < _SMALL:
                    continue
                if part == _INITIALIZER:
                    contents += _measure_tensor(data, first, last)
                elif part == _NODE:
                    contents += _measure_node(data, first, last)
        if entries > MAX_ENTRIES:
            raise ArtifactError(f"{path} has more than {MAX_ENTRIES} nodes and tensors")
    return contents


def _measure_node(data: mmap.mmap, start: int, end: int) -> int:
    """Return the bytes of the contents of a node's tensors: a constant has one."""
    return sum(
        _measure_tensor(data, first, last)
        for field, head, tail in _walk(data, start, end)
        if field == _ATTRIBUTE
        for part, first, last in _walk(data, head, tail)
        if part == _TENSOR
    )


def _measure_tensor(data: mmap.mmap, start: int, end: int) -> int:
    return sum(last - first for field, first, last in _walk(data, start, end) if field in _CONTENTS)


def _walk(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field, start, end) of what a message holds; numbers have no bytes of their own.

    Raises:
        IndexError, ValueError: the message is damaged.
    """
    place = start
    while place < end:
        tag, place = _read_varint(data, place)
        kind = tag & 7
        first = place
        if kind == _BYTES:
            length, first = _read_varint(data, place)
            place = first + length
        elif kind == _VARINT:
            _, place = _read_varint(data, place)
            first = place
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
            first = place
        else:
            raise ValueError(kind)
        if place > end:
            raise ValueError(place)
        yield tag >> 3, first, place


def _read_varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    """Return a number and the place behind it.

    Raises:
        IndexError, ValueError: it is damaged.
    """
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > _TOP_BYTE:
            raise ValueError(shift)
