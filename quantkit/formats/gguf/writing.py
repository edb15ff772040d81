"""The only place that writes GGUF files.

Own code and not gguf-py's `GGUFWriter`: tensors come in pieces (that writer wants each whole), the
hash is taken on the way, the bytes follow from the arguments alone, and files appear under their
names only when all of them are on the disk. gguf-py and llama.cpp are the judges in the tests.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.durable import sync
from quantkit.errors import writing
from quantkit.formats.gguf.header import (
    ARRAY,
    KIND_IDS,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
    MAX_PARTS,
    NUMBERS,
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    STRING,
    VERSION,
    GgufSpec,
    MetadataValue,
    Value,
    name_part,
    pad,
)
from quantkit.formats.shards import BESIDE, appearing_together

_FITTING_ARRAYS: Mapping[str, str] = MappingProxyType({"b": "b", "f": "fiu"})
_FITTING_TYPES: Mapping[str, set[type]] = MappingProxyType({"b": {bool}, "f": {float, int}})

Content = Tensor | Iterable[bytes | memoryview]
"""uint8 [R, row bytes], or the same bytes in pieces."""


def write_gguf(
    folder: Path,
    name: str,
    metadata: Mapping[str, MetadataValue],
    specs: Sequence[GgufSpec],
    contents: Iterable[tuple[str, Content]],
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write `<name>.gguf`, or the parts `<name>-00001-of-0000N.gguf`, into `folder`.

    Args:
        folder: exists already.
        name: of the file, without the ending.
        metadata: in the order of the file; the first part holds it, the others what tells parts
            apart (`split.*`, as llama-model-loader.cpp reads them), which is added here.
        specs: every tensor, in the order in which it will lie in the files.
        contents: name and bytes of each tensor, in the same order.
        max_shard_bytes: bytes of tensors that one file may hold; a larger tensor gets its own.

    Returns:
        File name -> sha256, taken as the bytes were written. Equal input gives equal bytes.

    Raises:
        ResourceError, OutputError: a file cannot be written; none is left under its final name.
        ValueError: the metadata or the tensors cannot be expressed in the format, or a content is
            not what `specs` announces.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} is no name of a file")
    _check_specs(specs)
    parts = plan_parts(specs, max_shard_bytes)
    files = [name_part(name, position, len(parts)) for position in range(len(parts))]
    headers = [
        _pack_header(entries, part)
        for entries, part in zip(_divide(metadata, parts), parts, strict=True)
    ]
    source = iter(contents)
    hashes = {}
    with appearing_together(folder, files):
        for file, header, part in zip(files, headers, parts, strict=True):
            with writing(folder / file):
                hashes[file] = _write_file(folder / (file + BESIDE), header, part, source)
        if (extra := next(source, None)) is not None:
            raise ValueError(f"tensor {extra[0]} was not announced")
    return hashes


def plan_parts(specs: Sequence[GgufSpec], max_shard_bytes: int) -> list[list[GgufSpec]]:
    """Cut `specs`, in their order, into files of at most `max_shard_bytes` bytes of tensors.

    Raises:
        ValueError: these are more files than the format can count.
    """
    parts: list[list[GgufSpec]] = [[]]
    filled = 0
    for spec in specs:
        if parts[-1] and filled + pad(spec.size) > max_shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(spec)
        filled += pad(spec.size)
    if len(parts) > MAX_PARTS:
        raise ValueError(
            f"{len(parts)} files of {max_shard_bytes} bytes: GGUF has at most {MAX_PARTS}"
        )
    return parts


def _check_specs(specs: Sequence[GgufSpec]) -> None:
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError("two tensors have the same name")
    for spec in specs:
        length = len(spec.name.encode())
        if not 0 < length <= MAX_NAME_BYTES:
            raise ValueError(
                f"the name of tensor {spec.name!r} has {length} bytes: GGUF has 1 to "
                f"{MAX_NAME_BYTES}"
            )
        if len(spec.shape) > MAX_DIMENSIONS:
            raise ValueError(f"tensor {spec.name} has more than {MAX_DIMENSIONS} dimensions")


def _divide(
    metadata: Mapping[str, MetadataValue], parts: Sequence[Sequence[GgufSpec]]
) -> Iterator[dict[str, MetadataValue]]:
    """Yield the metadata of each part."""
    if len(parts) == 1:
        yield dict(metadata)
        return
    tensors = sum(map(len, parts))
    for position in range(len(parts)):
        yield {
            **(metadata if position == 0 else {}),
            SPLIT_NUMBER: Value("uint16", position),
            SPLIT_COUNT: Value("uint16", len(parts)),
            SPLIT_TENSORS: Value("int32", tensors),
        }


def _pack_header(metadata: Mapping[str, MetadataValue], specs: Sequence[GgufSpec]) -> bytes:
    """Compose all that comes before the tensors' bytes, with the padding.

    Raises:
        ValueError: a value does not fit its kind.
    """
    pieces = [MAGIC, struct.pack("<IQQ", VERSION, len(specs), len(metadata))]
    for key, value in metadata.items():
        pieces.append(_pack_string(key))
        try:
            pieces.append(_pack_value(value))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(f"metadata {key} cannot be stored as {value.kind}: {error}") from error
    offset = 0
    for spec in specs:
        pieces.append(_pack_string(spec.name))
        dimensions = spec.shape[::-1]
        pieces.append(struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        pieces.append(struct.pack("<IQ", spec.kind.id, offset))
        offset += pad(spec.size)
    header = b"".join(pieces)
    return header if not specs else header + bytes(pad(len(header)) - len(header))


def _pack_string(text: str) -> bytes:
    # Tokens of some vocabularies are not UTF-8; the reader keeps their bytes in the same way.
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pack_value(value: MetadataValue) -> bytes:
    kind = struct.pack("<I", KIND_IDS[value.kind])
    if isinstance(value, Value):
        return kind + _pack_items(value.kind, [value.content])
    head = struct.pack("<I", KIND_IDS[ARRAY]) + kind + struct.pack("<Q", len(value))
    return head + _pack_items(value.kind, value.content)


def _pack_items(kind: str, items: Sequence[object] | NDArray[np.generic]) -> bytes:
    """Compose the bytes of values of one kind; numbers keep their value or are refused.

    Raises:
        KeyError, TypeError, OverflowError: there is no such kind, or the values are not of it.
    """
    if kind == STRING:
        return b"".join(map(_pack_string, items))
    dtype = NUMBERS[kind]
    if isinstance(items, np.ndarray):
        fits = items.dtype.kind in _FITTING_ARRAYS.get(dtype.kind, "iu")
    else:
        fits = set(map(type, items)) <= _FITTING_TYPES.get(dtype.kind, {int})
    if not fits:
        raise TypeError("the type is another")
    with np.errstate(over="ignore"):
        stored = np.asarray(items).astype(dtype) if dtype.kind == "f" else np.array(items, dtype)
    given = np.asarray(items)
    same = np.isfinite(given) == np.isfinite(stored) if dtype.kind == "f" else given == stored
    if not np.all(same):
        raise OverflowError("out of range")
    return stored.tobytes()


def _write_file(
    path: Path, header: bytes, specs: Sequence[GgufSpec], source: Iterator[tuple[str, Content]]
) -> str:
    """Stream one file to the disk and return its sha256."""
    digest = hashlib.sha256(header)
    with path.open("wb") as handle:
        handle.write(header)
        for spec in specs:
            name, content = next(source, (None, ()))
            if name != spec.name:
                raise ValueError(f"tensor {spec.name} was announced, {name} was given")
            for piece in _pieces(spec, content):
                digest.update(piece)
                handle.write(piece)
    sync(path)
    return digest.hexdigest()


def _pieces(spec: GgufSpec, content: Content) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a content, checked against its spec, and the padding.

    Raises:
        ValueError: dtype or size differ.
    """
    if isinstance(content, Tensor):
        if content.dtype != torch.uint8:
            raise ValueError(f"tensor {spec.name}: packed rows are uint8, not {content.dtype}")
        content = (content.detach().cpu().contiguous().reshape(-1).numpy().data,)
    size = 0
    for piece in content:
        size += memoryview(piece).nbytes
        yield piece
    if size != spec.size:
        raise ValueError(f"tensor {spec.name} has {spec.size} bytes, {size} were given")
    yield bytes(pad(size) - size)
