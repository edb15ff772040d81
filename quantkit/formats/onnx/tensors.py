"""One tensor of an ONNX file: where its bytes lie, whether they are all there, and reading them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.checkpoint.paths import join_inside
from quantkit.errors import ArtifactError, CheckpointError, unreadable
from quantkit.formats.onnx.element_types import DATA_TYPES, DataType

_NUMPY = {
    "FLOAT": "<f4",
    "DOUBLE": "<f8",
    "FLOAT16": "<f2",
    "BOOL": "?",
    **{
        f"{sign}INT{bits}": f"<{letter}{bits // 8}"
        for sign, letter in (("", "i"), ("U", "u"))
        for bits in (8, 16, 32, 64)
    },
    "COMPLEX64": "<c8",
    "COMPLEX128": "<c16",
}
_PACKED = frozenset({"UINT4", "INT4", "UINT2", "INT2"})
"""Several values a byte, the first in the lowest bits."""

_MAX_DIMS = 32
_MAX_VALUES = 1 << 48
"""Values of a tensor, dimensions of 0 not counted: numpy multiplies what it is given."""
_MAX_DIGITS = 19
_EXTERNAL = 1


@dataclass(frozen=True)
class OnnxTensor:
    """One tensor whose bytes are known to be there."""

    name: str
    kind: DataType
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    file: Path | None
    """The data file; None: in the graph."""
    offset: int
    proto: Any = field(repr=False, compare=False)

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def check_tensor(proto: Any, name: str, path: Path) -> OnnxTensor:
    """Look at the description of a tensor and at where its bytes should be.

    Args:
        proto: onnx.TensorProto.
        name: what messages call it.
        path: the ONNX file, beside which the data files lie.

    Raises:
        ArtifactError: a description that cannot be, or bytes that are not there.
    """
    where = f"{path}: tensor {name}"
    kind = DATA_TYPES.get(proto.data_type)
    if kind is None:
        raise ArtifactError(f"{where} has the type {proto.data_type}, which ONNX does not have")
    shape = tuple(proto.dims)
    if len(shape) > _MAX_DIMS:
        raise ArtifactError(f"{where} has {len(shape)} dimensions")
    if any(size < 0 for size in shape):
        raise ArtifactError(f"{where} has the shape {list(shape)}: no dimension can be negative")
    if math.prod(size or 1 for size in shape) > _MAX_VALUES:
        raise ArtifactError(f"{where} has the shape {list(shape)}, which no file can hold")
    if proto.HasField("segment"):
        raise ArtifactError(f"{where} is cut into segments, which no runtime reads")
    size = -(-math.prod(shape) * kind.bits // 8)
    if proto.data_location == _EXTERNAL:
        file, offset = _find_external(proto, size, path, where)
        return OnnxTensor(name, kind, shape, size, file, offset, proto)
    if kind.name == "STRING":
        size = sum(map(len, proto.string_data))
    _check_content(proto, kind, math.prod(shape), size, where)
    return OnnxTensor(name, kind, shape, size, None, 0, proto)


def _find_external(proto: Any, size: int, path: Path, where: str) -> tuple[Path, int]:
    """Return the data file of a tensor and the place in it.

    Raises:
        ArtifactError: the file lies elsewhere, or does not hold the tensor.
    """
    entries: dict[str, str] = {}
    for entry in proto.external_data:
        if entry.key in entries:
            raise ArtifactError(f"{where}: {entry.key!r} of its data file is given twice")
        entries[entry.key] = entry.value
    if proto.data_type == 8:
        raise ArtifactError(f"{where} holds texts, which cannot lie in a data file")
    if "location" not in entries:
        raise ArtifactError(f"{where} lies in a data file that is not named")
    try:
        file = join_inside(path.parent, entries["location"])
    except CheckpointError as error:
        raise ArtifactError(f"{where}: {error}") from None
    offset = _read_number(entries.get("offset", "0"), "offset", where)
    try:
        available = file.stat().st_size if file.is_file() else None
    except OSError as error:
        raise unreadable(f"{file}, of {where}", error, ArtifactError) from None
    if available is None:
        raise ArtifactError(f"{where} lies in {file.name}, which is missing")
    length = _read_number(entries["length"], "length", where) if "length" in entries else size
    if length != size:
        raise ArtifactError(
            f"{where} has {length} bytes in {file.name}, its type and shape take {size}"
        )
    if offset + size > available:
        raise ArtifactError(
            f"{where} ends at byte {offset + size} of {file.name}, which has {available}"
        )
    return file, offset


def _read_number(text: str, what: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise ArtifactError(f"{where}: the {what} {text[:40]!r} is no number of bytes")
    return int(text)


def _check_content(proto: Any, kind: DataType, count: int, size: int, where: str) -> None:
    """Compare the values in the graph with the shape.

    Raises:
        ArtifactError: there are more or fewer.
    """
    if kind.name != "STRING" and proto.HasField("raw_data"):
        if len(proto.raw_data) != size:
            raise ArtifactError(
                f"{where} has {len(proto.raw_data)} bytes, its type and shape take {size}"
            )
        return
    needed = size if kind.name in _PACKED else count * kind.per_value
    if kind.name == "FLOAT4E2M1":
        needed = size
    found = len(getattr(proto, kind.content))
    if found != needed:
        raise ArtifactError(f"{where} has {found} values, its type and shape take {needed}")


def read_values(tensor: OnnxTensor) -> np.ndarray:
    """Return a tensor's values: bfloat16 and 8-bit floats as float32, packed integers a byte each.

    Raises:
        ArtifactError: the data file changed, or texts were asked for.
    """
    return read_flat(tensor, 0, tensor.count).reshape(tensor.shape)


def read_floats(tensor: OnnxTensor) -> np.ndarray:
    """Return a tensor's values as float32; what is beyond its range becomes infinite.

    Raises:
        ArtifactError: as `read_values`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return read_values(tensor).real.astype(np.float32)


def read_flat(tensor: OnnxTensor, start: int, stop: int) -> np.ndarray:
    """Return the values from `start` up to `stop` of the flattened tensor, as `read_values` does.

    Args:
        start: a multiple of 8, so that it lies on a byte.

    Raises:
        ArtifactError: the data file changed, or texts were asked for.
    """
    kind = tensor.kind
    if kind.name == "STRING":
        raise ArtifactError(f"tensor {tensor.name} holds texts, no numbers")
    if tensor.file is None and not tensor.proto.HasField("raw_data"):
        return _widen(_unpack_typed(tensor)[start:stop])
    first, last = start * kind.bits // 8, -(-stop * kind.bits // 8)
    data = np.frombuffer(_read_bytes(tensor, first, last), np.uint8)
    if kind.name in _PACKED:
        return unpack_bits(data, kind.bits, signed=kind.name[0] == "I")[: stop - start]
    if kind.name == "BFLOAT16":
        wide = data.view("<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    if kind.name in _NUMPY:
        return data.view(_NUMPY[kind.name])
    return _decode_small_float(data, kind)[: stop - start]


def iterate_values(tensor: OnnxTensor, step: int = 1 << 22) -> Iterator[np.ndarray]:
    """Yield the flattened values in pieces of `step`.

    Raises:
        ArtifactError: as `read_flat`.
    """
    if tensor.file is None:
        # Protobuf copies all of a field for whoever asks for a part.
        whole = read_flat(tensor, 0, tensor.count)
        yield from (whole[start : start + step] for start in range(0, len(whole), step))
        return
    for start in range(0, tensor.count, step):
        yield read_flat(tensor, start, min(start + step, tensor.count))


def _read_bytes(tensor: OnnxTensor, first: int, last: int) -> bytes:
    if tensor.file is None:
        found: bytes = tensor.proto.raw_data[first:last]
        return found
    try:
        with tensor.file.open("rb") as handle:
            handle.seek(tensor.offset + first)
            found = handle.read(last - first)
    except OSError as error:
        raise unreadable(tensor.file, error, ArtifactError) from error
    if len(found) != last - first:
        raise ArtifactError(f"{tensor.file} changed: tensor {tensor.name} is cut short")
    return found


def unpack_bits(data: np.ndarray, bits: int, *, signed: bool = False) -> np.ndarray:
    """Unpack codes of any width, the first in the lowest bits, from the last axis.

    Args:
        data: uint8 [..., B]; bits: 1 to 8.

    Returns:
        uint8, or int8 where `signed`: [..., 8 B / bits].
    """
    if bits == 8:
        return data.view(np.int8) if signed else data
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = ((data[..., None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8)
        codes = codes.reshape(*data.shape[:-1], -1)
    else:
        flags = np.unpackbits(data, axis=-1, bitorder="little")
        flags = flags[..., : flags.shape[-1] // bits * bits]
        weights = (1 << np.arange(bits)).astype(np.uint8)
        codes = (flags.reshape(*data.shape[:-1], -1, bits) * weights).sum(-1, dtype=np.uint8)
    if signed:
        half = 1 << (bits - 1)
        return ((codes ^ half).astype(np.int16) - half).astype(np.int8)
    return codes


def _unpack_typed(tensor: OnnxTensor) -> np.ndarray:
    from onnx import numpy_helper

    found: np.ndarray = numpy_helper.to_array(tensor.proto).reshape(-1)
    return found


def _widen(values: np.ndarray) -> np.ndarray:
    """Turn types that numpy does not have itself into ones that it has."""
    name = values.dtype.name
    if "int" in name or name in ("float16", "float32", "float64", "bool"):
        packed = name.lstrip("u") in ("int4", "int2")
        return values.astype(np.uint8 if name[0] == "u" else np.int8) if packed else values
    return values if values.dtype.kind == "c" else values.astype(np.float32)


def _decode_small_float(data: np.ndarray, kind: DataType) -> np.ndarray:
    from onnx import TensorProto, numpy_helper

    count = len(data) * 8 // kind.bits
    proto = TensorProto(data_type=kind.number, dims=[count], raw_data=data.tobytes())
    return _widen(numpy_helper.to_array(proto))
