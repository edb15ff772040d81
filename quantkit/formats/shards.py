"""The only place that writes the safetensors files of an artifact.

A safetensors file is eight bytes of header length, a JSON header and the tensors' bytes without
gaps (https://github.com/huggingface/safetensors). Since the header follows from the declared names,
dtypes and shapes, tensors can be streamed: memory holds one at a time, and the hash is taken on
the way. Files are filled under temporary names and renamed when all of them are on the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.checkpoint.headers import ITEM_BYTES
from quantkit.checkpoint.reader import DTYPES
from quantkit.durable import sync, write_atomically
from quantkit.errors import writing

INDEX_NAME = "model.safetensors.index.json"
BESIDE = ".writing"
"""Ending of a file that is not whole yet."""

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {dtype: name for name, dtype in DTYPES.items()}
)
"""torch dtype -> safetensors' name of it."""

Content = Tensor | Iterable[bytes | memoryview]
"""A tensor, or its little-endian bytes in pieces."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a file will hold."""

    name: str
    dtype: str
    """safetensors' name of the dtype."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def plan_shards(
    specs: Iterable[TensorSpec], max_shard_bytes: int
) -> tuple[tuple[TensorSpec, ...], ...]:
    """Cut `specs`, in their order, into files of at most `max_shard_bytes` bytes of tensors.

    A tensor larger than that gets a file of its own. A tensor also opens a new file where it
    would not start at a multiple of its element size: the format allows no padding between
    tensors, and readers map them as they lie.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        full = filled + spec.size > max_shard_bytes
        if shards[-1] and (full or filled % ITEM_BYTES[spec.dtype]):
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.size
    return tuple(map(tuple, shards))


def write_shards(
    folder: Path,
    specs: Sequence[TensorSpec],
    contents: Iterable[tuple[str, Content]],
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write one `model.safetensors`, or several shards and their index, into `folder`.

    Args:
        folder: exists already.
        specs: every tensor, in the order in which it will lie in the files.
        contents: name and content of each tensor, in the same order.
        max_shard_bytes: bytes of tensors that one file may hold.

    Returns:
        File name -> sha256, taken as the bytes were written. Equal input gives equal bytes.

    Raises:
        ResourceError, OutputError: a file cannot be written; none is left under its final name.
        ValueError: a content is not what `specs` announces.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError("two tensors have the same name")
    shards = plan_shards(specs, max_shard_bytes)
    files = [_file_name(position, len(shards)) for position in range(len(shards))]
    hashes = {}
    source = iter(contents)
    with appearing_together(folder, [*files, INDEX_NAME] if len(files) > 1 else files):
        for file, shard in zip(files, shards, strict=True):
            with writing(folder / file):
                hashes[file] = _write_file(folder / (file + BESIDE), shard, source)
        if (extra := next(source, None)) is not None:
            raise ValueError(f"tensor {extra[0]} was not announced")
        if len(shards) > 1:
            index = _encode(_index(files, shards))
            with writing(folder / INDEX_NAME):
                hashes[INDEX_NAME] = _write_bytes(folder / (INDEX_NAME + BESIDE), index)
    return hashes


def write_document(path: Path, document: Mapping[str, object]) -> str:
    """Write a JSON file atomically; return the sha256 of its bytes.

    Raises:
        ResourceError, OutputError: it cannot be written.
    """
    data = _encode(document)

    def write(beside: Path) -> None:
        beside.write_bytes(data)

    write_atomically(path, write)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def appearing_together(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Give files that are written beside their final names these names, or remove them all.

    Raises:
        ResourceError, OutputError: a file cannot be renamed; none stays.
    """
    finished = False
    try:
        yield
        with writing(folder):
            for name in names:
                (folder / (name + BESIDE)).replace(folder / name)
            sync(folder)
        finished = True
    finally:
        for name in names:
            (folder / (name + BESIDE)).unlink(missing_ok=True)
            if not finished:
                (folder / name).unlink(missing_ok=True)


def _file_name(position: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{position + 1:05d}-of-{count:05d}.safetensors"


def _write_file(
    path: Path, shard: Sequence[TensorSpec], source: Iterator[tuple[str, Content]]
) -> str:
    """Stream one file to the disk and return its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as handle:
        header = _header(shard)
        digest.update(header)
        handle.write(header)
        for spec in shard:
            name, content = next(source, (None, ()))
            if name != spec.name:
                raise ValueError(f"tensor {spec.name} was announced, {name} was given")
            with closing(_pieces(spec, content)) as pieces:
                for piece in pieces:
                    digest.update(piece)
                    handle.write(piece)
    sync(path)
    return digest.hexdigest()


def _header(shard: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in shard:
        end = start + spec.size
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(spec: TensorSpec, content: Content) -> Generator[bytes | memoryview, None, None]:
    """Yield the bytes of a content, checked against its spec.

    Raises:
        ValueError: dtype, shape or size differ.
    """
    if isinstance(content, Tensor):
        if (DTYPE_NAMES.get(content.dtype), tuple(content.shape)) != (spec.dtype, spec.shape):
            raise ValueError(
                f"tensor {spec.name} was announced as {spec.dtype} {list(spec.shape)}, "
                f"{content.dtype} {list(content.shape)} was given"
            )
        flat = content.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
        return
    size = 0
    for piece in content:
        size += len(piece)
        yield piece
    if size != spec.size:
        raise ValueError(f"tensor {spec.name} has {spec.size} bytes, {size} were given")


def _write_bytes(path: Path, data: bytes) -> str:
    """Write a small file to the disk and return its sha256."""
    path.write_bytes(data)
    sync(path)
    return hashlib.sha256(data).hexdigest()


def _index(files: Sequence[str], shards: Sequence[Sequence[TensorSpec]]) -> dict[str, object]:
    places = {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard}
    total = sum(spec.size for shard in shards for spec in shard)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _encode(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
