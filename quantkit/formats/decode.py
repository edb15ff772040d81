"""Quantized layers found and read back in an artifact's files, ours or another tool's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.config_groups import ConfigGroup, find_config_groups, order_groups
from quantkit.formats.encoding import decode_layer
from quantkit.formats.layouts import (
    PACKED,
    PARTS,
    SCALE,
    SHAPE,
    WEIGHT,
    Layout,
    part_dtypes,
    part_shapes,
)
from quantkit.records import QuantizedLayer, Source

CODE_DTYPES = ("I8", "F8_E4M3", "F8_E5M2")
"""safetensors' names of the dtypes of a `weight` that holds codes."""

_REORDERED = "weight_g_idx"


def open_artifact(folder: Path) -> Checkpoint:
    """Open a folder with config.json and weights; headers only.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        return open_checkpoint(Source(str(folder), folder, None))
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error


def read_layer(folder: Path, name: str) -> QuantizedLayer:
    """Read one quantized layer of a compressed-tensors artifact.

    Args:
        folder: holds config.json and the weights.
        name: full module name, for instance `model.layers.0.self_attn.q_proj`.

    Raises:
        ArtifactError: there is no such layer, or its tensors do not fit each other.
    """
    return read_stored_layer(open_artifact(folder), name)


def read_stored_layer(artifact: Checkpoint, name: str) -> QuantizedLayer:
    """Read one quantized layer of an opened artifact.

    Raises:
        ArtifactError: there is no such layer, or its tensors do not fit each other.
    """
    layout, _ = find_layout(artifact, name)
    names = {part: f"{name}.{part}" for part in PARTS if f"{name}.{part}" in artifact.tensors}
    try:
        parts = {part: read_tensor(artifact, tensor) for part, tensor in names.items()}
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    return decode_layer(name, layout, parts)


def list_layers(artifact: Checkpoint) -> Iterator[str]:
    """Yield the names of the layers that hold codes, packed or plain."""
    for tensor, info in artifact.tensors.items():
        module, _, leaf = tensor.rpartition(".")
        if leaf == PACKED or (leaf == WEIGHT and info.dtype in CODE_DTYPES):
            yield module


def find_layout(
    artifact: Checkpoint, name: str, groups: Sequence[ConfigGroup] | None = None
) -> tuple[Layout, tuple[int, int]]:
    """Find out a quantized layer's layout and its weight's shape [O, I].

    The groups of config.json that can claim the layer are tried on its tensors, the one that its
    readers choose first. Reads the sixteen bytes of `weight_shape`; all else comes from the
    headers.

    Args:
        artifact: opened.
        name: full module name.
        groups: those of its config, for callers that ask for many layers.

    Raises:
        ArtifactError: a tensor is missing, or no group explains the tensors.
    """
    groups = find_config_groups(artifact.config) if groups is None else groups
    stored = artifact.tensors
    found = {part: stored[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in stored}
    if f"{name}.{_REORDERED}" in stored:
        raise ArtifactError(
            f"layer {name} has {_REORDERED}: columns in another order cannot be decoded"
        )
    needed = (PACKED, SCALE, SHAPE) if PACKED in found else (WEIGHT, SCALE)
    missing = [part for part in needed if part not in found]
    if missing:
        raise ArtifactError(f"layer {name} has no {', '.join(missing)}")
    rows, columns = find_shape(artifact, name)
    shapes = {part: info.shape or (1,) for part, info in found.items()}
    for group in order_groups(name, groups):
        if columns % (group.layout.group_size or columns):
            continue
        expected, dtypes = part_shapes(group.layout, rows, columns), part_dtypes(group.layout)
        # A packed layer's 16-bit weight may lie beside it, which is for others to judge.
        extra = shapes.keys() - expected.keys() - ({WEIGHT} if PACKED in expected else set())
        fits = all(
            shapes.get(part) == shape and found[part].dtype in dtypes[part]
            for part, shape in expected.items()
        )
        if fits and not extra:
            return group.layout, (rows, columns)
    described = ", ".join(f"{part} {info.dtype} {list(info.shape)}" for part, info in found.items())
    raise ArtifactError(
        f"layer {name} [{rows}, {columns}] is stored as {described}: no group of config.json fits"
    )


def find_shape(artifact: Checkpoint, name: str) -> tuple[int, int]:
    """Return the shape [O, I] of a layer's weight, which may be packed.

    Raises:
        ArtifactError: there is none, or it makes no sense.
    """
    if f"{name}.{PACKED}" in artifact.tensors:
        return _read_shape(artifact, f"{name}.{SHAPE}")
    info = artifact.tensors[f"{name}.{WEIGHT}"]
    if len(info.shape) != 2:
        raise ArtifactError(f"tensor {info.name} has the shape {list(info.shape)}: not a matrix")
    rows, columns = info.shape
    return rows, columns


def _read_shape(artifact: Checkpoint, name: str) -> tuple[int, int]:
    info = artifact.tensors.get(name)
    if info is None:
        raise ArtifactError(f"layer {name.rpartition('.')[0]} has no {SHAPE}")
    if info.shape != (2,) or info.dtype not in ("I64", "I32"):
        raise ArtifactError(
            f"tensor {name} is {info.dtype} {list(info.shape)}, expected two numbers"
        )
    try:
        rows, columns = map(int, read_tensor(artifact, name))
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    if rows < 1 or columns < 1:
        raise ArtifactError(f"tensor {name} holds [{rows}, {columns}], which is no shape")
    return rows, columns
