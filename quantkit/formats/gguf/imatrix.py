"""llama.cpp's importance matrix files: how strongly the inputs of each matrix are excited.

For every column the mean square of the matrix's input, as llama-imatrix collects it and
llama-quantize weighs errors with it (tools/imatrix, tools/quantize and common/imatrix-loader.cpp
of llama.cpp, build 11549). There are two forms: GGUF, with the sums and the numbers of tokens, and
the older `.dat`, with means times the number of chunks.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quantkit.durable import write_atomically
from quantkit.errors import CalibrationError
from quantkit.formats.gguf.container import GgufFile, open_gguf, read_tensor_rows
from quantkit.formats.gguf.cursor import Cursor, opened
from quantkit.formats.gguf.header import MAGIC, Array, GgufSpec, MetadataValue, Value
from quantkit.formats.gguf.writing import write_gguf
from quantkit.ggml_types import GGML_TYPES

Form = Literal["gguf", "dat"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_ALL_IN_ONE = 1 << 62
_USUAL_CHUNK = 512
"""Tokens of a chunk of llama-imatrix by default; the `.dat` form does not say them."""
_SMALLEST_ENTRY = 12


@dataclass(frozen=True)
class ImatrixEntry:
    """What was seen of the inputs of one matrix, or of a stack of matrices (experts)."""

    sums: Tensor
    """float32 [M, I]: sums of the squares of the inputs, for each matrix of the stack."""
    counts: Tensor
    """int64 [M]: tokens that each matrix saw."""


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix file."""

    entries: Mapping[str, ImatrixEntry]
    """By the name of the tensor in a GGUF file of the model."""
    datasets: tuple[str, ...] = ()
    """Names of the text, for the record."""
    chunks: int = 0
    chunk_size: int = _USUAL_CHUNK
    """Tokens of a chunk."""
    form: Form = field(default="gguf", compare=False)
    """Of the file that it was read from."""

    def find_importance(self, name: str, columns: int) -> Tensor | None:
        """Return the mean squares of the inputs of a tensor, as llama-quantize uses them.

        Returns:
            float32 [I], or [M, I] for a stack of matrices; None where nothing was recorded. A
            matrix that saw no token gets ones.

        Raises:
            CalibrationError: the entry is for another number of columns.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        counts = entry.counts.to(torch.float32)[:, None]
        means = torch.where(counts > 0, entry.sums / counts, torch.ones(()))
        if means.numel() % columns or (len(means) > 1 and means.shape[1] != columns):
            raise CalibrationError(
                f"the importance matrix has {list(means.shape)} values for {name}, which has "
                f"{columns} columns: it was made for another model"
            )
        means = means.reshape(-1, columns)
        return means[0] if len(means) == 1 else means


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix in either form.

    Raises:
        CheckpointError: the file is missing, cut short or not what its form says.
        CalibrationError: it is no importance matrix, or has values that cannot be ones.
    """
    with opened(path) as (handle, size):
        is_gguf = handle.read(len(MAGIC)) == MAGIC
        if not is_gguf:
            handle.seek(0)
            found = _read_dat(Cursor(path, handle, size, limit=size))
    if is_gguf:
        found = _read_gguf(open_gguf(path))
    for name, entry in found.entries.items():
        if not bool(torch.isfinite(entry.sums).all()) or bool((entry.sums < 0).any()):
            raise CalibrationError(
                f"{path}: the sums of {name!r} are not finite numbers from 0: make it again"
            )
    return found


def write_imatrix(path: Path, imatrix: Imatrix, form: Form = "gguf") -> str:
    """Write an importance matrix; return the sha256 of the file.

    Args:
        path: ends with `.gguf` where that is the form.

    Raises:
        ResourceError, OutputError: it cannot be written; nothing is left of it.
        ValueError: there is nothing to write, a name is too long for the format, or the path has
            another ending.
    """
    if not imatrix.entries:
        raise ValueError("an importance matrix without entries cannot be read again")
    if form == "gguf":
        return _write_gguf(path, imatrix)
    data = b"".join(_compose_dat(imatrix))

    def write(beside: Path) -> None:
        beside.write_bytes(data)

    write_atomically(path, write)
    return hashlib.sha256(data).hexdigest()


def _read_gguf(file: GgufFile) -> Imatrix:
    if file.find("general.type") != "imatrix":
        raise CalibrationError(f"{file.path} is a GGUF file, but no importance matrix")
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    counted = [name.removesuffix(_COUNTS) for name in file.tensors if name.endswith(_COUNTS)]
    if not names or sorted(names) != sorted(counted):
        raise CalibrationError(f"{file.path} has no entries, or sums without counts")
    datasets = file.find_array(_DATASETS)
    return Imatrix(
        entries=MappingProxyType({name: _read_entry(file, name) for name in names}),
        datasets=() if datasets is None else tuple(map(str, datasets.items)),
        chunks=_find_number(file, _CHUNKS, 0),
        chunk_size=_find_number(file, _CHUNK_SIZE, _USUAL_CHUNK) or _USUAL_CHUNK,
    )


def _find_number(file: GgufFile, key: str, otherwise: int) -> int:
    value = file.find(key)
    return value if type(value) is int and value >= 0 else otherwise


def _read_entry(file: GgufFile, name: str) -> ImatrixEntry:
    sums, counts = (file.tensors[name + ending] for ending in (_SUMS, _COUNTS))
    kinds = {sums.kind.name, counts.kind.name}
    if kinds != {"F32"} or not sums.shape or sums.rows != counts.size // 4:
        raise CalibrationError(
            f"{file.path}: {name!r} has sums of the shape {list(sums.shape)} and counts of "
            f"{list(counts.shape)}, {' and '.join(sorted(kinds))}: they are not those of one matrix"
        )
    numbers = read_tensor_rows(file, counts.name).reshape(-1).view(torch.float32)
    if not bool(((numbers >= 0) & (numbers < 2**62)).all()):
        raise CalibrationError(f"{file.path}: the counts of {name!r} are no counts: make it again")
    values = read_tensor_rows(file, sums.name).view(torch.float32)
    return ImatrixEntry(values, numbers.round().to(torch.int64))


def _write_gguf(path: Path, imatrix: Imatrix) -> str:
    if path.suffix != ".gguf":
        raise ValueError(f"{path} has to end with .gguf")
    metadata: dict[str, MetadataValue] = {
        "general.type": Value("string", "imatrix"),
        _DATASETS: Array("string", imatrix.datasets),
        _CHUNKS: Value("uint32", imatrix.chunks),
        _CHUNK_SIZE: Value("uint32", imatrix.chunk_size),
    }
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(imatrix.entries.items()):
        tensors[name + _SUMS] = entry.sums.to(torch.float32).contiguous()
        tensors[name + _COUNTS] = entry.counts.to(torch.float32)[:, None].contiguous()
    float32 = GGML_TYPES["F32"]
    specs = [GgufSpec(name, float32, tuple(tensor.shape)) for name, tensor in tensors.items()]
    contents = ((name, tensor.view(torch.uint8)) for name, tensor in tensors.items())
    (digest,) = write_gguf(path.parent, path.stem, metadata, specs, contents, _ALL_IN_ONE).values()
    return digest


def _read_dat(cursor: Cursor) -> Imatrix:
    """Read the old form; what follows the entries is optional in it."""
    count = cursor.read_number("int32", "the number of entries")
    if count < 1 or count * _SMALLEST_ENTRY > cursor.left:
        raise CalibrationError(f"{cursor.path} is no importance matrix, of neither form")
    entries: dict[str, ImatrixEntry] = {}
    for _ in range(count):
        at = cursor.position
        name = _read_text(cursor, "the name of an entry")
        if name in entries:
            raise cursor.fault(f"{name!r} is given twice", at)
        entries[name] = _read_old_entry(cursor, name)
    chunks, dataset = 0, ""
    if cursor.left:
        chunks = max(0, cursor.read_number("int32", "the number of chunks"))
    if cursor.left:
        dataset = _read_text(cursor, "the name of the text")
    if cursor.left:
        raise cursor.fault(f"{cursor.left} bytes follow the last entry")
    return Imatrix(
        entries=MappingProxyType(entries),
        datasets=(dataset,) if dataset else (),
        chunks=chunks,
        form="dat",
    )


def _read_text(cursor: Cursor, what: str) -> str:
    size = cursor.read_number("int32", what)
    if size < 0:
        raise cursor.fault(f"{what} has a length of {size}")
    return cursor.take(size, what).decode("utf-8", "backslashreplace")


def _read_old_entry(cursor: Cursor, name: str) -> ImatrixEntry:
    """Read means times the number of chunks; counts and sums become those of whole chunks."""
    chunks = cursor.read_number("int32", f"the chunks of {name!r}")
    length = cursor.read_number("int32", f"the length of {name!r}")
    if length < 1:
        raise cursor.fault(f"{name!r} has {length} values")
    values = np.array(cursor.read_numbers("float32", length, f"the values of {name!r}"))
    counts = torch.tensor([max(1, chunks) * _USUAL_CHUNK])
    return ImatrixEntry(torch.from_numpy(values)[None] * _USUAL_CHUNK, counts)


def _compose_dat(imatrix: Imatrix) -> Iterator[bytes]:
    """Yield the pieces of a file in the old form, as llama-imatrix writes it."""
    seen = {name: entry for name, entry in imatrix.entries.items() if bool(entry.counts.any())}
    if not seen:
        raise ValueError("no matrix saw a token: there is nothing that the .dat form could hold")
    yield struct.pack("<i", len(seen))
    for name, entry in sorted(seen.items()):
        chunks = -(-int(entry.counts.max()) // imatrix.chunk_size)
        means = imatrix.find_importance(name, entry.sums.shape[1])
        assert means is not None
        yield _compose_text(name)
        yield struct.pack("<ii", chunks, means.numel())
        yield (means * chunks).numpy().astype("<f4").tobytes()
    yield struct.pack("<i", imatrix.chunks)
    yield _compose_text(imatrix.datasets[-1] if imatrix.datasets else "")


def _compose_text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<i", len(data)) + data
