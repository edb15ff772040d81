"""The file beside a graph that holds its tensors: laid out first, then streamed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.durable import sync, write_atomically
from quantkit.formats.onnx.dtypes import ITEM_BYTES, TORCH_DTYPES

_PAGE = 4096
_LINE = 64


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies. dtype: onnx's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorPlace, ...]:
    """Give each (name, dtype, shape) its place, in their order.

    Tensors of a page or more start at a page, so that they can be mapped.
    """
    places, end = [], 0
    for name, dtype, shape in tensors:
        place = TensorPlace(name, dtype, shape, 0)
        unit = _PAGE if place.size >= _PAGE else _LINE
        place = TensorPlace(name, dtype, shape, -(-end // unit) * unit)
        places.append(place)
        end = place.offset + place.size
    return tuple(places)


def write_tensors(path: Path, places: Sequence[TensorPlace], contents: Iterable[Tensor]) -> str:
    """Write the tensors, one in memory at a time; return the sha256 of the file.

    Raises:
        ResourceError, OutputError: the file cannot be written; nothing is left of it.
        ValueError: a content is not what its place announces.
    """
    digest = hashlib.sha256()

    def write(beside: Path) -> None:
        end, source = 0, iter(contents)
        with beside.open("wb") as handle:
            for place in places:
                tensor = next(source, None)
                if tensor is None:
                    raise ValueError(f"tensor {place.name} was not given")
                found = (tuple(tensor.shape), tensor.dtype)
                if found != (place.shape, TORCH_DTYPES[place.dtype]):
                    raise ValueError(f"tensor {place.name} is {found}, not {place}")
                for piece in (bytes(place.offset - end), _bytes_of(tensor)):
                    digest.update(piece)
                    handle.write(piece)
                end = place.offset + place.size
                # Held on to, it would be in memory while the next one is made.
                del tensor, piece
        if next(source, None) is not None:
            raise ValueError("there are more tensors than places")

    write_atomically(path, write)
    sync(path.parent)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
