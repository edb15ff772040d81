"""Tensors that go from the checkpoint into the artifact as they are, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.checkpoint.reader import DTYPES, Checkpoint, check_finite, read_tensor
from quantkit.errors import CheckpointError, unreadable
from quantkit.formats.shards import Content
from quantkit.records import TensorInfo

_CHUNK = 1 << 23


def read_content(checkpoint: Checkpoint, name: str) -> Content:
    """Return a tensor's bytes in pieces or, where its file is a pickle, the tensor.

    A piece is valid until the next one is asked for.

    Raises:
        CheckpointError: the file is cut short or a value is NaN or infinite; for pieces, when the
            reader gets there.
    """
    info = checkpoint.tensors[name]
    if info.file.suffix == ".bin":
        return read_tensor(checkpoint, name)
    return _read_pieces(info)


def is_same(
    checkpoint: Checkpoint, first: str, second: str, other: Checkpoint | None = None
) -> bool:
    """Say whether two tensors have the same dtype, shape and bytes.

    The second is looked for in `other`, where that is given.
    """
    other = checkpoint if other is None else other
    infos = (checkpoint.tensors[first], other.tensors[second])
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return False
    one, two = read_content(checkpoint, first), read_content(other, second)
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return torch.equal(read_tensor(checkpoint, first), read_tensor(other, second))
    return all(piece == peer for piece, peer in zip(one, two, strict=True))


def _read_pieces(info: TensorInfo) -> Iterator[memoryview]:
    """Read a tensor of a safetensors file through a buffer that holds whole elements."""
    buffer = torch.empty(min(info.size, _CHUNK), dtype=torch.uint8)
    view = buffer.numpy().data
    left = info.size
    try:
        with info.file.open("rb") as handle:
            handle.seek(info.start)
            while left:
                count = min(left, _CHUNK)
                if handle.readinto(view[:count]) < count:
                    raise CheckpointError(f"{info.file} was cut short while it was in use")
                check_finite(info, buffer[:count].view(DTYPES[info.dtype]))
                yield view[:count]
                left -= count
    except OSError as error:
        raise unreadable(info.file, error) from error
