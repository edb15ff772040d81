"""How much memory an ONNX file asks for, before protobuf makes objects of it.

An object takes up to a hundred times the bytes that it has in the file, and a number that is packed
into one byte takes eight. So all of a file is walked first, by the message types that protobuf will
go by, and what it will make of it is added up. Only the contents of tensors may be large: protobuf
keeps them as they are.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import ArtifactError
from quantkit.varints import read_varint

MAX_BYTES = 2**31 - 1
"""What protobuf reads as one message; larger models keep their weights beside."""
MAX_STRUCTURE = 64 << 20
"""Bytes of a graph without the contents of its tensors. A decoder of 32 blocks has one megabyte."""
MAX_MEMORY = 256 << 20
"""Bytes that protobuf's objects may take. A decoder of 32 blocks takes ten megabytes."""
MAX_ENTRIES = 1 << 20
"""Nodes, tensors, attributes and other messages; fields of all of them may be four times as many,
since each takes a microsecond to look at."""

_MAX_DEPTH = 100
"""Of messages within messages: protobuf's own limit."""
_TENSOR = "onnx.TensorProto"
_CONTENTS = frozenset({4, 9, 10})
"""Fields of a tensor whose bytes protobuf copies: float_data, raw_data, double_data."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TEXT_TYPE, _MESSAGE_TYPE, _BYTES_TYPE = 9, 11, 12
"""Types of fields, of google.protobuf.descriptor.FieldDescriptor."""
_MESSAGE_BYTES, _STRING_BYTES, _NUMBER_BYTES = 192, 32, 8
"""What an empty message, an empty string and a number take (protobuf 6, upb)."""


@dataclass(frozen=True)
class _Kind:
    """What a message type has in which field; numbers in all others."""

    messages: Mapping[int, str]
    texts: frozenset[int]
    strings: frozenset[int]
    """Of bytes."""


@dataclass
class _Tally:
    """What was met so far."""

    path: Path
    kinds: Mapping[str, _Kind]
    contents: int = 0
    memory: int = 0
    entries: int = 0
    fields: int = 0


def check_structure(path: Path) -> None:
    """Walk a model and add up what protobuf will make of it.

    Raises:
        ArtifactError: the file is not a protobuf message, or asks for more memory than a graph may.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size == 0:
        raise ArtifactError(f"{path} is empty")
    if size > MAX_BYTES:
        raise ArtifactError(f"{path} has {size} bytes: protobuf reads {MAX_BYTES} at the most")
    root, kinds = _describe_messages()
    tally = _Tally(path, kinds)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _add(tally, data, 0, len(data), root, 0)
        except UnicodeDecodeError:
            raise ArtifactError(f"{path} is damaged: a name in it is not UTF-8") from None
        except (IndexError, ValueError):
            raise ArtifactError(f"{path} is cut short, or no ONNX file") from None
    structure = size - tally.contents
    if structure > MAX_STRUCTURE:
        raise ArtifactError(
            f"{path} holds {structure} bytes besides its tensors, {MAX_STRUCTURE} are read"
        )


def _describe_messages() -> tuple[str, dict[str, _Kind]]:
    """Return the name of the outermost message type, and name -> fields of all below it."""
    from onnx import ModelProto

    found: dict[str, _Kind] = {}
    pending: list[Any] = [ModelProto.DESCRIPTOR]
    while pending:
        descriptor = pending.pop()
        if descriptor.full_name in found:
            continue
        inner = {each.number: each for each in descriptor.fields if each.type == _MESSAGE_TYPE}
        found[descriptor.full_name] = _Kind(
            {number: each.message_type.full_name for number, each in inner.items()},
            *(
                frozenset(each.number for each in descriptor.fields if each.type == kind)
                for kind in (_TEXT_TYPE, _BYTES_TYPE)
            ),
        )
        pending += [each.message_type for each in inner.values()]
    return ModelProto.DESCRIPTOR.full_name, found


def _add(tally: _Tally, data: mmap.mmap, start: int, end: int, name: str, depth: int) -> None:
    """Add a message and all within it.

    Raises:
        IndexError, ValueError: the message is damaged.
        ArtifactError: it is too much.
    """
    if depth > _MAX_DEPTH:
        raise ArtifactError(f"{tally.path} is nested deeper than {_MAX_DEPTH} levels")
    kind = tally.kinds[name]
    tally.memory += _MESSAGE_BYTES
    tally.entries += 1
    if tally.entries > MAX_ENTRIES:
        raise ArtifactError(f"{tally.path} has more than {MAX_ENTRIES} nodes and tensors")
    for number, first, last in _walk(data, start, end):
        tally.fields += 1
        if number in kind.messages:
            _add(tally, data, first, last, kind.messages[number], depth + 1)
        elif name == _TENSOR and number in _CONTENTS:
            tally.contents += last - first
        elif number in kind.texts:
            # Protobuf hands out bytes for texts that are damaged.
            data[first:last].decode()
            tally.memory += _STRING_BYTES + last - first
        elif number in kind.strings:
            tally.memory += _STRING_BYTES + last - first
        else:
            # Packed ones take a byte each at the least.
            tally.memory += _NUMBER_BYTES * max(1, last - first)
        if tally.memory > MAX_MEMORY or tally.fields > 4 * MAX_ENTRIES:
            raise ArtifactError(
                f"{tally.path} would take more than {MAX_MEMORY >> 20} MB besides its tensors, or "
                f"has more than {4 * MAX_ENTRIES} fields: no graph does"
            )


def _walk(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field, start, end) of what a message holds; numbers have no bytes of their own.

    Raises:
        IndexError, ValueError: the message is damaged.
    """
    place = start
    while place < end:
        tag, place = read_varint(data, place)
        kind = tag & 7
        first = place
        if kind == _BYTES:
            length, first = read_varint(data, place)
            place = first + length
        elif kind == _VARINT:
            _, place = read_varint(data, place)
            first = place
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
            first = place
        else:
            raise ValueError(kind)
        if place > end:
            raise ValueError(place)
        yield tag >> 3, first, place
