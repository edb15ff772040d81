"""Codes as the operators MatMulNBits and GatherBlockQuantized of ONNX Runtime read them.

A weight [N, K] is cut into blocks of B columns, the last of which may be short. With b bits:

    codes        uint8 [N, ceil(K / B), B * b / 8]     unsigned, the first in the low bits
    scales       float [N * ceil(K / B)]
    zero points  uint8 [N * ceil(ceil(K / B) * b / 8)]  packed as codes are, row by row; absent
                 where all are 2**(b-1)

Source: the operators' documentation (docs/ContribOperators.md of ONNX Runtime 1.32). quantkit's
codes and zero points are signed: 2**(b-1) less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.records import QuantizedLayer
from quantkit.schemes import ONNX_CHANNEL_BLOCK


def block_columns(group_size: int | None) -> int:
    """Return the columns of a block; a scale for a whole row is repeated for each of its blocks."""
    return ONNX_CHANNEL_BLOCK if group_size is None else group_size


def count_blocks(columns: int, block: int) -> int:
    """Return the blocks of a row."""
    return -(-columns // block)


def pack_codes(codes: Tensor, bits: int, block: int) -> Tensor:
    """Pack signed codes int8 [N, K] into uint8 [N, blocks, block * bits / 8]."""
    rows, columns = codes.shape
    blocks = count_blocks(columns, block)
    packed = _pack(codes, bits, blocks * block)
    return packed.reshape(rows, blocks, block * bits // 8)


def pack_zero_points(zero_point: Tensor, bits: int, blocks: int) -> Tensor:
    """Pack signed zero points int8 [N, blocks] or [N, 1] into uint8 [N * ceil(blocks*bits/8)]."""
    expanded = zero_point.expand(-1, blocks)
    per_byte = 8 // bits
    return _pack(expanded, bits, -(-blocks // per_byte) * per_byte).flatten()


def expand_scales(scale: Tensor, blocks: int) -> Tensor:
    """Return a scale for each block [N * blocks] from scales [N, blocks] or [N, 1]."""
    return scale.expand(-1, blocks).flatten()


def pack_layer(layer: QuantizedLayer, part: str, rows: slice) -> Tensor:
    """Return the codes, scales or zero points of some rows of a layer.

    Args:
        part: `codes`, `scales` or `zero_points`.

    Raises:
        ValueError: the layer has no such part.
    """
    bits, block = layer.scheme.weight_bits, block_columns(layer.group_size)
    blocks = count_blocks(layer.codes.shape[1], block)
    if part == "codes":
        return pack_codes(layer.codes[rows], bits, block)
    if part == "scales":
        return expand_scales(layer.scale[rows], blocks)
    if part == "zero_points" and layer.zero_point is not None:
        return pack_zero_points(layer.zero_point[rows], bits, blocks)
    raise ValueError(f"{layer.name} has no {part}")


def _pack(codes: Tensor, bits: int, width: int) -> Tensor:
    """Shift signed codes [N, K] to unsigned ones, fill up to `width`, pack into bytes."""
    unsigned = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    filled = torch.nn.functional.pad(unsigned, (0, width - codes.shape[1]))
    if bits == 8:
        return filled
    lanes = filled.reshape(codes.shape[0], -1, 2)
    return lanes[:, :, 0] | (lanes[:, :, 1] << 4)
