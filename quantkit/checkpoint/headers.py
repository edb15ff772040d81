"""safetensors headers and shard indexes, walked with bounds before anything relies on them.

Format: https://github.com/huggingface/safetensors: eight bytes of header length (little-endian),
a JSON header, the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

from quantkit.checkpoint.mistaken import HEAD_BYTES, recognise, recognise_file
from quantkit.errors import CheckpointError, unreadable
from quantkit.records import TensorInfo

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

_MOST_DIMENSIONS = 64
"""Of a shape, as numpy's: the product of a million numbers takes a minute."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F64", "I64", "U64"), 8),
        **dict.fromkeys(("F32", "I32", "U32"), 4),
        **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
    }
)
"""safetensors' name of a dtype -> bytes of one element."""

WEIGHT_DTYPES: Mapping[str, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
)
"""torch's name of a dtype that weights are computed in -> safetensors' name of it."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name, from its header alone.

    Raises:
        CheckpointError: the file is missing, cut short, or its header is not what the format says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                claim = (
                    f"its header claims {length} bytes and the file has {size}; download or copy "
                    f"it again"
                )
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: {recognise_file(path) or claim}"
                )
            text = handle.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise unreadable(path, error) from error
    entries = parse_json(text, f"the header of {path}")
    entries.pop("__metadata__", None)
    start = 8 + length
    infos = {name: _read_entry(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, list(infos.values()), start, size)
    return infos


def read_index(path: Path) -> dict[str, str]:
    """Return the `weight_map` of a shard index: tensor name -> file name.

    Raises:
        CheckpointError: it cannot be read or is not an index.
    """
    document = read_json(path)
    places = document.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map: it is not a shard index")
    for name, file in places.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path}: the file of tensor {name!r} is {file!r}, not a name")
    return places


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object.

    Raises:
        CheckpointError: it is missing, no file, too large, or not a JSON object.
    """
    try:
        found = path.stat()
        # A pipe in the place of a file would block for ever.
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"cannot read {path}: it is not a file")
        if found.st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_HEADER_BYTES} bytes")
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise unreadable(path, error) from error


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object; a key given twice is refused, since readers differ on which one wins.

    Raises:
        CheckpointError: `text` is something else.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise CheckpointError(f"{what} gives {twice!r} twice")
        return found

    try:
        document = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        reason = recognise(text[:HEAD_BYTES]) or error
        raise CheckpointError(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return document


def _read_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """Check one tensor's dtype, shape and offsets against each other."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is not described by an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where} has the dtype {dtype!r}, which is unknown (known: {', '.join(ITEM_BYTES)})"
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has the shape {shape} and the offsets {offsets}")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{where} is {dtype} {shape}, which takes {expected} bytes, "
            f"but its offsets {offsets} span {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, expected)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _check_layout(path: Path, infos: list[TensorInfo], start: int, size: int) -> None:
    """Refuse overlaps, gaps, and a file that ends before or after its last tensor."""
    reached = start
    for info in sorted(infos, key=lambda info: (info.start, info.size)):
        if info.start != reached:
            fault = "overlaps the one before it" if info.start < reached else "follows a gap"
            raise CheckpointError(f"{path}: tensor {info.name!r} {fault}")
        reached = info.start + info.size
    if reached > size:
        raise CheckpointError(
            f"{path} is cut short: its tensors end at byte {reached} and the file has {size}; "
            f"download or copy it again"
        )
    if reached < size:
        raise CheckpointError(
            f"{path} has {size - reached} bytes behind its last tensor: it is not what it claims"
        )
