"""Whether the numbers in an artifact can be right: finite, in range, and not left at 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.errors import CheckpointError
from quantkit.formats.kv_scales import KV_SCALES
from quantkit.formats.layouts import INPUT_SCALE, SCALE, WEIGHT, ZERO_POINT
from quantkit.formats.passthrough import read_content
from quantkit.formats.reader_rules import ClaimedLayer
from quantkit.records import TensorInfo

_SCALES = (SCALE, INPUT_SCALE, *KV_SCALES)


def check_values(artifact: Checkpoint) -> Iterator[str]:
    """Read every tensor of floating-point numbers and yield what cannot be.

    One tensor's piece is in memory at a time.
    """
    for name, info in artifact.tensors.items():
        try:
            if name.rpartition(".")[2] in _SCALES:
                yield from _check_scale(info, read_tensor(artifact, name))
            elif info.dtype.startswith(("F", "BF")):
                _read_through(artifact, name)
        except CheckpointError as error:
            yield str(error)


def _check_scale(info: TensorInfo, scale: Tensor) -> Iterator[str]:
    if not scale.is_floating_point():
        yield f"tensor {info.name} is {info.dtype}: a scale is a floating-point number"
        return
    wrong = int((scale.float() <= 0).sum())
    if wrong:
        yield f"tensor {info.name} holds {wrong} scales that are not positive, of {scale.numel()}"


def _read_through(artifact: Checkpoint, name: str) -> None:
    """Let the reader look at every value.

    Raises:
        CheckpointError: one is a NaN or an infinity.
    """
    content = read_content(artifact, name)
    if not isinstance(content, Tensor):
        for _ in content:
            pass


def check_codes(artifact: Checkpoint, claimed: Iterable[ClaimedLayer]) -> Iterator[str]:
    """Yield layers whose plain codes or zero points do not fit their bits.

    Packed ones cannot be out of range, and codes of eight bits neither.
    """
    for layer in claimed:
        layout = layer.layout
        if layout is None or layout.packed or layout.kind != "int" or layout.bits == 8:
            continue
        for part in (WEIGHT, ZERO_POINT):
            name = f"{layer.name}.{part}"
            info = artifact.tensors.get(name)
            if info is None or info.dtype != "I8":
                continue
            values = read_tensor(artifact, name)
            half = 1 << (layout.bits - 1)
            wrong = int(((values < -half) | (values >= half)).sum())
            if wrong:
                yield f"tensor {name} holds {wrong} values that are not of {layout.bits} bits"


def check_cache_scales(artifact: Checkpoint) -> Iterator[str]:
    """Yield a problem where all scales of keys, or all of values, are exactly 1.

    That is what servers take for a missing one, and what calibration never gives everywhere.
    """
    for part in KV_SCALES:
        names = [name for name in artifact.tensors if name.rpartition(".")[2] == part]
        try:
            scales = [read_tensor(artifact, name).float() for name in names]
        except CheckpointError:
            # What is damaged is told by the check of all values.
            continue
        if scales and all(bool(torch.eq(scale, 1).all()) for scale in scales):
            yield (
                f"every {part} of the {len(scales)} attention layers is exactly 1: the key/value "
                f"cache was not calibrated"
            )
