"""GPTQ's layout, both versions of it.

In place of a layer's `weight` [O, I], with G groups along I, stand

    qweight  int32 [I * bits / 32, O]   unsigned codes, packed along I, lowest bits first
    qzeros   int32 [G, O * bits / 32]   unsigned zero points, packed along O
    scales   [G, O], float
    g_idx    int32 [I], optional        the group of each column; absent: columns in order

and a weight is `scale * (code - zero)`. The first layout (`gptq`) stores zero - 1, the second
(`gptq_v2`) the zero point itself. Written and read by AutoGPTQ (nn_modules/qlinear/qlinear_cuda.py,
`pack` and `forward`), GPTQModel (nn_modules/qlinear/__init__.py, `dequantize_weight`;
utils/model.py, `convert_gptq_v1_to_v2_format_module`), auto-round and vLLM.

In the first layout a zero point of 0 cannot be stored. Writers that subtract from whole words let
it borrow from its neighbour, which adding to the words undoes; what other writers made of it, their
readers disagree on, and it is refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ArtifactError
from quantkit.formats.readers.description import StoredQuantization
from quantkit.formats.readers.layers import (
    FLOATS,
    LayerCodes,
    StoredLayer,
    describe_codes,
    find_parts,
    read_part,
    refuse_groups,
    refuse_parts,
    show_parts,
)
from quantkit.numerics.affine import code_range
from quantkit.numerics.packing import unpack_rows
from quantkit.records import TensorInfo

QWEIGHT = "qweight"
_PARTS = (QWEIGHT, "qzeros", "scales", "g_idx")
_BITS = (2, 4, 8)


def find_gptq_layer(
    checkpoint: Checkpoint, quantization: StoredQuantization, name: str
) -> StoredLayer:
    """Find out a layer's shape, bits and groups from the headers.

    Raises:
        ArtifactError: a tensor is missing, or the tensors do not fit each other or the config.
    """
    parts = find_parts(checkpoint.tensors, name, _PARTS)
    _check_presence(name, parts)
    if quantization.mixed:
        quantization = _describe_by_shapes(parts, quantization)
    _check_shapes(name, parts, quantization)
    (words, rows), bits = parts[QWEIGHT].shape, quantization.bits
    return describe_codes(name, (rows, words * 32 // bits), bits, quantization, parts)


def read_gptq_codes(
    checkpoint: Checkpoint, quantization: StoredQuantization, layer: StoredLayer
) -> LayerCodes:
    """Read a layer's codes, scales, zero points and the order of its columns.

    Raises:
        ArtifactError: a tensor is damaged, or its values contradict the config.
    """
    packed = read_part(checkpoint, layer, QWEIGHT)
    codes = unpack_rows(packed.T.contiguous(), layer.bits, layer.shape[1])
    scale = read_part(checkpoint, layer, "scales").T.contiguous()
    zero_point = _read_zero_points(checkpoint, quantization, layer)
    order = _read_group_index(checkpoint, layer)
    if order is None:
        return LayerCodes(codes, scale, zero_point)
    if not _is_by_groups(order, layer):
        return LayerCodes(codes, scale, zero_point, order)
    # Whole groups in another order: their scales are put into the order of the columns.
    firsts = order[:: layer.group_size]
    moved = None if zero_point is None else zero_point[:, firsts].contiguous()
    return LayerCodes(codes, scale[:, firsts].contiguous(), moved)


def is_reordered(checkpoint: Checkpoint, layer: StoredLayer) -> bool:
    """Say whether the groups are other than equally many columns side by side.

    Raises:
        ArtifactError: `g_idx` names a group that there is not.
    """
    order = _read_group_index(checkpoint, layer)
    return order is not None and not _is_by_groups(order, layer)


def _read_group_index(checkpoint: Checkpoint, layer: StoredLayer) -> Tensor | None:
    """Return the group of each column, int64 [I], or None for equal groups in order."""
    columns, size = layer.shape[1], layer.group_size or layer.shape[1]
    in_order = torch.arange(columns) // size
    if "g_idx" not in layer.parts:
        return None if columns % size == 0 else in_order
    order = read_part(checkpoint, layer, "g_idx").to(torch.int64)
    groups = checkpoint.tensors[layer.parts["scales"]].shape[0]
    low, high = map(int, torch.aminmax(order))
    if low < 0 or high >= groups:
        raise ArtifactError(
            f"tensor {layer.parts['g_idx']} names group {low if low < 0 else high}, "
            f"but layer {layer.name} has {groups} group{'s' if groups != 1 else ''}"
        )
    return None if columns % size == 0 and torch.equal(order, in_order) else order


def _is_by_groups(order: Tensor, layer: StoredLayer) -> bool:
    """Whether the columns are whole groups of one size, in whatever order."""
    size = layer.group_size or layer.shape[1]
    return len(order) % size == 0 and torch.equal(order, order[::size].repeat_interleave(size))


def _read_zero_points(
    checkpoint: Checkpoint, quantization: StoredQuantization, layer: StoredLayer
) -> Tensor | None:
    """Return the signed zero points int8 [O, G], or None where a symmetric layer has only zeros."""
    packed = read_part(checkpoint, layer, "qzeros")
    bits, rows = layer.bits, layer.shape[0]
    smallest, largest = code_range(bits)
    if quantization.zero_offset and quantization.borrowing:
        packed = _add_to_words(packed, bits)
    stored = unpack_rows(packed, bits, rows).to(torch.int16)
    if quantization.zero_offset and not quantization.borrowing:
        if bool((stored == largest).any()):
            raise ArtifactError(
                f"layer {layer.name} has stored zero points of {(1 << bits) - 1}, where zero - 1 "
                f"ran out of its bits and readers disagree: ask for the model as gptq_v2"
            )
        stored += 1
    zero_point = stored.to(torch.int8).T.contiguous()
    if not layer.symmetric:
        return zero_point
    if bool((zero_point != 0).any()):
        raise ArtifactError(
            f"layer {layer.name} has zero points other than {-smallest}, but {quantization.where} "
            f"describes symmetric weights (sym): its readers would see different weights"
        )
    return None


def _add_to_words(packed: Tensor, bits: int) -> Tensor:
    """Add one to each value of int32 words as one number, carries included."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = (packed.to(torch.int64) + ones) & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _check_presence(name: str, parts: dict[str, TensorInfo]) -> None:
    missing = [part for part in _PARTS[:3] if part not in parts]
    if missing:
        raise ArtifactError(f"layer {name} has no {' and no '.join(missing)}")
    right = (
        (parts[QWEIGHT].dtype, len(parts[QWEIGHT].shape)) == ("I32", 2)
        and (parts["qzeros"].dtype, len(parts["qzeros"].shape)) == ("I32", 2)
        and parts["scales"].dtype in FLOATS
        and len(parts["scales"].shape) == 2
        and all(info.size for info in parts.values())
        and ("g_idx" not in parts or parts["g_idx"].dtype in ("I32", "I64"))
    )
    if not right:
        raise ArtifactError(f"layer {name} is stored as {show_parts(parts)}: not as GPTQ is")


def _describe_by_shapes(
    parts: dict[str, TensorInfo], quantization: StoredQuantization
) -> StoredQuantization:
    """Bits and group size of a layer that may differ from the config's.

    Which layers differ is told by regular expressions; the shapes say it without running those.
    """
    bits = _bits_by_shapes(parts) or quantization.bits
    groups, columns = parts["scales"].shape[0], parts[QWEIGHT].shape[0] * 32 // bits
    size = quantization.group_size
    if groups == 1:
        size = None
    elif columns % groups == 0 and groups != -(-columns // (size or columns)):
        size = columns // groups
    return replace(quantization, bits=bits, group_size=size)


def _bits_by_shapes(parts: dict[str, TensorInfo]) -> int | None:
    words, rows = parts["qzeros"].shape[1], parts["scales"].shape[1]
    return next((bits for bits in _BITS if words * 32 == rows * bits), None)


def _check_shapes(
    name: str, parts: dict[str, TensorInfo], quantization: StoredQuantization
) -> None:
    """Compare the tensors with each other and with the config."""
    bits, found = quantization.bits, _bits_by_shapes(parts)
    if found not in (None, bits):
        raise ArtifactError(
            f"layer {name} holds codes of {found} bits, but {quantization.where} says {bits}"
        )
    (words, rows), groups = parts[QWEIGHT].shape, parts["scales"].shape[0]
    columns = words * 32 // bits
    size = quantization.group_size or columns
    fits = (
        parts["scales"].shape == (groups, rows)
        and parts["qzeros"].shape == (groups, rows * bits // 32)
        and rows * bits % 32 == 0
        and ("g_idx" not in parts or parts["g_idx"].shape == (columns,))
    )
    if not fits:
        raise refuse_parts(name, parts, bits)
    if groups != -(-columns // size):
        raise refuse_groups(name, groups, columns, quantization)
