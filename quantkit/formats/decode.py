"""Packed layers found and read back in an artifact's files, ours or another tool's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.packed_layers import (
    PACKED,
    PARTS,
    SCALE,
    SHAPE,
    PackedLayout,
    decode_layer,
    packed_shapes,
)
from quantkit.records import QuantizedLayer, Source


@dataclass(frozen=True)
class ConfigGroup:
    """A group of layers that config.json describes."""

    layout: PackedLayout
    targets: tuple[str, ...]


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
    """Read one packed layer of a compressed-tensors artifact.

    Args:
        folder: holds config.json and the weights.
        name: full module name, for instance `model.layers.0.self_attn.q_proj`.

    Raises:
        ArtifactError: there is no such layer, or its tensors do not fit each other.
    """
    artifact = open_artifact(folder)
    layout, _ = find_layout(artifact, name)
    names = {part: f"{name}.{part}" for part in PARTS if f"{name}.{part}" in artifact.tensors}
    try:
        parts = {part: read_tensor(artifact, tensor) for part, tensor in names.items()}
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    return decode_layer(name, layout, parts)


def find_layout(artifact: Checkpoint, name: str) -> tuple[PackedLayout, tuple[int, int]]:
    """Find out a packed layer's layout and its weight's shape [O, I].

    The groups of config.json are tried on the shapes of the layer's tensors, those that name the
    layer first. Reads the sixteen bytes of `weight_shape`; all else comes from the headers.

    Raises:
        ArtifactError: a tensor is missing, or no group explains the shapes.
    """
    stored = artifact.tensors
    shapes = {part: stored[f"{name}.{part}"].shape for part in PARTS if f"{name}.{part}" in stored}
    missing = [part for part in (PACKED, SCALE, SHAPE) if part not in shapes]
    if missing:
        raise ArtifactError(f"layer {name} has no {', '.join(missing)}")
    rows, columns = _read_shape(artifact, f"{name}.{SHAPE}")
    groups = find_config_groups(artifact.config)
    for group in sorted(groups, key=lambda group: name not in group.targets):
        divides = columns % (group.layout.group_size or columns) == 0
        if divides and packed_shapes(group.layout, rows, columns) == shapes:
            return group.layout, (rows, columns)
    found = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
    raise ArtifactError(
        f"layer {name} [{rows}, {columns}] is stored as {found}: no group of config.json fits"
    )


def find_config_groups(config: Mapping[str, Any]) -> tuple[ConfigGroup, ...]:
    """Return the groups with integer weights that a config describes, well-formed ones only."""
    description = config.get("quantization_config")
    groups = description.get("config_groups") if isinstance(description, dict) else None
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int":
            continue
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if type(bits) is not int or not 1 <= bits <= 8:
            continue
        if weights.get("strategy") == "channel" or size in (None, -1):
            size = None
        elif type(size) is not int or size < 1:
            continue
        targets = group.get("targets")
        names = tuple(map(str, targets)) if isinstance(targets, list) else ()
        found.append(
            ConfigGroup(PackedLayout(bits, weights.get("symmetric") is not False, size), names)
        )
    return tuple(found)


def _read_shape(artifact: Checkpoint, name: str) -> tuple[int, int]:
    info = artifact.tensors[name]
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
