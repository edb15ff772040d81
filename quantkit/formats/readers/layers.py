"""One quantized layer of another tool's checkpoint: where it lies, its codes, and its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.layouts import find_scheme, name_scheme, pack_weights_only
from quantkit.formats.readers.description import StoredQuantization
from quantkit.numerics.affine import dequantize
from quantkit.records import QuantizedLayer, TensorInfo
from quantkit.schemes import Scheme

FLOATS = ("F16", "BF16", "F32")
"""Dtypes of the scales of integer codes."""


@dataclass(frozen=True)
class StoredLayer:
    """Where one quantized layer lies, known from the headers."""

    name: str
    """Full module name."""
    shape: tuple[int, int]
    """Of the weight, [O, I]."""
    bits: int
    group_size: int | None
    """Columns that share a scale; None: `sharing` says what does."""
    sharing: str
    """What shares a scale: `group`, `channel`, `tensor` or `block`."""
    symmetric: bool
    scheme: str
    """In quantkit's words, for instance `w4a16_asym`."""
    parts: Mapping[str, str]
    """Last part of a tensor's name -> its full name; all that take the weight's place."""


@dataclass(frozen=True)
class LayerCodes:
    """The codes of a layer in compressed-tensors' signed convention, nothing rounded.

    codes: int8 [O, I]; scale: [O, G] in its stored dtype; zero_point: int8 [O, G], or None where
    all are zero. group_index: int64 [I], the group of each column; None: G groups of the same
    size side by side.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_index: Tensor | None = None


def name_codes(bits: int, symmetric: bool, group_size: int | None) -> str:
    """Name the weight-only scheme of such integer codes, whether quantkit can make it or not."""
    return name_scheme(pack_weights_only(bits, symmetric, group_size))


def describe_codes(
    name: str,
    shape: tuple[int, int],
    bits: int,
    quantization: StoredQuantization,
    parts: Mapping[str, TensorInfo],
) -> StoredLayer:
    """Describe a layer of integer codes; `parts` take its weight's place."""
    size, symmetric = quantization.group_size, quantization.symmetric
    return StoredLayer(
        name=name,
        shape=shape,
        bits=bits,
        group_size=size,
        sharing="channel" if size is None else "group",
        symmetric=symmetric,
        scheme=name_codes(bits, symmetric, size),
        parts={part: info.name for part, info in parts.items()},
    )


def refuse_groups(
    name: str, groups: int, columns: int, quantization: StoredQuantization
) -> ArtifactError:
    """Return what to raise where a layer has other groups than its config says."""
    return ArtifactError(
        f"layer {name} has {groups} groups for {columns} columns, but {quantization.where} "
        f"says groups of {quantization.group_size or 'all columns'}"
    )


def refuse_parts(name: str, parts: Mapping[str, TensorInfo], bits: int) -> ArtifactError:
    """Return what to raise where the tensors of a layer do not fit each other."""
    return ArtifactError(
        f"layer {name} is stored as {show_parts(parts)}, which do not fit each other "
        f"for codes of {bits} bits"
    )


def read_part(checkpoint: Checkpoint, layer: StoredLayer, part: str) -> Tensor:
    """Read one of a layer's tensors.

    Raises:
        ArtifactError: it cannot be read, or holds a NaN or an infinity.
    """
    try:
        return read_tensor(checkpoint, layer.parts[part])
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error


def find_parts(
    tensors: Mapping[str, TensorInfo], name: str, known: tuple[str, ...]
) -> dict[str, TensorInfo]:
    """Return those of a layer's `known` parts that are stored, by the last part of their names."""
    return {part: tensors[f"{name}.{part}"] for part in known if f"{name}.{part}" in tensors}


def show_parts(parts: Mapping[str, TensorInfo]) -> str:
    """Dtypes and shapes of tensors, for a message."""
    return ", ".join(f"{part} {info.dtype} {list(info.shape)}" for part, info in parts.items())


def dequantize_codes(codes: LayerCodes) -> Tensor:
    """Return the float32 weight [O, I]: the exact product of codes and scales."""
    group = codes.group_index
    if group is None:
        return dequantize(codes.codes, codes.scale, codes.zero_point)
    weight = codes.codes.float()
    if codes.zero_point is not None:
        weight -= codes.zero_point.float()[:, group]
    weight *= codes.scale.float()[:, group]
    return weight


def scheme_of(layer: StoredLayer) -> Scheme:
    """Return the scheme that the compressed-tensors writer has for a layer's codes.

    Raises:
        ArtifactError: there is none.
    """
    scheme = find_scheme(pack_weights_only(layer.bits, layer.symmetric, layer.group_size))
    if scheme is None:
        raise ArtifactError(
            f"layer {layer.name} is {layer.scheme}, which quantkit does not write as "
            f"compressed-tensors: convert --to safetensors, which writes its weights"
        )
    return scheme


def as_quantized_layer(layer: StoredLayer, codes: LayerCodes) -> QuantizedLayer:
    """Make the record that the compressed-tensors writer takes; nothing is rounded.

    Raises:
        ArtifactError: quantkit has no scheme for such codes.
        ValueError: the groups are not equally many columns side by side.
    """
    if codes.group_index is not None:
        raise ValueError(f"the columns of {layer.name} are not in the order of their groups")
    zero_point = codes.zero_point
    if zero_point is None and not layer.symmetric:
        zero_point = torch.zeros(codes.scale.shape, dtype=torch.int8)
    return QuantizedLayer(
        layer.name, scheme_of(layer), layer.group_size, codes.codes, codes.scale, zero_point
    )
