"""Bytes of the types with blocks of 32 weights, and of IQ4_XS.

Layouts: ggml-common.h of llama.cpp. A block is its float16 scale, its float16 minimum if it has
one, and its codes. Four bits of code i of 32 share a byte with those of code i + 16, the earlier
code in the lower half; fifth bits come before them, a bit field of 32. Super-blocks of IQ4_XS put
the scales of their sub-blocks before the codes, the two upper bits of all before the lower four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.ggml.blocks import GgmlBlocks

PACKED_HERE = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"))
"""Names of the types that this module packs."""

_FIVE_BITS = frozenset(("Q5_0", "Q5_1"))
_HALF = 16


def pack(blocks: GgmlBlocks) -> Tensor:
    """Return the bytes of the blocks, uint8 [R, row bytes].

    Raises:
        ValueError: the type is not of this module, or a code or scale is out of its range.
    """
    kind = blocks.type
    _check_kind(kind)
    codes = blocks.codes.unflatten(1, (-1, kind.block))
    fields = [_float16_bytes(blocks.d)]
    if blocks.m is not None:
        fields.append(_float16_bytes(blocks.m))
    if kind.name == "Q8_0":
        fields.append(codes.view(torch.uint8))
        return torch.cat(fields, 2).flatten(1)
    check_range(codes, kind.codes, kind, "code")
    if blocks.sub_scales is not None and kind.sub_scales is not None:
        check_range(blocks.sub_scales, kind.sub_scales, kind, "scale of a sub-block")
        fields += _pack_six_bits(blocks.sub_scales.unflatten(1, (codes.shape[1], -1)))
    # No code is far enough from zero to leave int8 by this.
    unsigned = (codes - kind.codes[0]).view(torch.uint8)
    if kind.name in _FIVE_BITS:
        fields.append(_pack_bits(unsigned >> 4))
    fields.append(_pack_nibbles(unsigned))
    return torch.cat(fields, 2).flatten(1)


def unpack(kind: GgmlType, data: Tensor) -> GgmlBlocks:
    """Return the blocks that bytes uint8 [R, row bytes] hold.

    Raises:
        ValueError: the type is not of this module, or rows are not whole blocks.
    """
    _check_kind(kind)
    block_bytes = split_blocks(kind, data)
    d, rest = read_float16(block_bytes), block_bytes[:, :, 2:]
    if kind.name == "Q8_0":
        return GgmlBlocks(kind, rest.contiguous().view(torch.int8).flatten(1), d)
    m, sub_scales = None, None
    if kind.has_minimum:
        m, rest = read_float16(rest), rest[:, :, 2:]
    if kind.sub_scales is not None:
        sub_scales = _unpack_six_bits(rest[:, :, :2], rest[:, :, 2:6]).flatten(1)
        rest = rest[:, :, 6:]
    if kind.name in _FIVE_BITS:
        unsigned = _unpack_nibbles(rest[:, :, 4:]) | (_unpack_bits(rest[:, :, :4]) << 4)
    else:
        unsigned = _unpack_nibbles(rest)
    codes = unsigned.view(torch.int8) + kind.codes[0]
    return GgmlBlocks(kind, codes.flatten(1), d, m, sub_scales)


def split_blocks(kind: GgmlType, data: Tensor) -> Tensor:
    """Return bytes uint8 [R, row bytes] as [R, B, bytes of a block].

    Raises:
        ValueError: rows are not whole blocks.
    """
    if data.shape[1] % kind.block_bytes:
        raise ValueError(
            f"{data.shape[1]} bytes are not whole blocks of {kind.block_bytes} bytes of {kind.name}"
        )
    return data.unflatten(1, (-1, kind.block_bytes))


def read_float16(block_bytes: Tensor) -> Tensor:
    """Return the float16 [R, B] that the first two of bytes [R, B, n] hold."""
    return block_bytes[:, :, :2].contiguous().view(torch.float16).squeeze(2)


def check_range(values: Tensor, limits: tuple[int, int], kind: GgmlType, what: str) -> None:
    """Check that integers lie within the limits, which fewer bits would break silently.

    Raises:
        ValueError: one does not.
    """
    if not values.numel():
        return
    smallest, largest = (int(limit) for limit in torch.aminmax(values))
    if smallest < limits[0] or largest > limits[1]:
        worst = smallest if smallest < limits[0] else largest
        raise ValueError(f"{what} {worst} is outside of {limits[0]}..{limits[1]} of {kind.name}")


def _check_kind(kind: GgmlType) -> None:
    if kind.name not in PACKED_HERE:
        raise ValueError(f"{kind.name} is none of {', '.join(sorted(PACKED_HERE))}")


def _float16_bytes(values: Tensor) -> Tensor:
    """[R, B] to uint8 [R, B, 2]."""
    return values.contiguous().unsqueeze(2).view(torch.uint8)


def _pack_nibbles(unsigned: Tensor) -> Tensor:
    """[R, B, n] to [R, B, n / 2]; the upper bits of the codes are left out."""
    halves = unsigned.unflatten(2, (-1, 2, _HALF))
    return ((halves[:, :, :, 0] & 15) | (halves[:, :, :, 1] << 4)).flatten(2)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    halves = packed.unflatten(2, (-1, _HALF))
    return torch.stack((halves & 15, halves >> 4), 3).flatten(2)


def _pack_bits(bits: Tensor) -> Tensor:
    """[R, B, 32] of zeros and ones to [R, B, 4], the first in the lowest bit."""
    lanes = bits.unflatten(2, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (lanes << shifts).sum(3, dtype=torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(3) >> shifts) & 1).flatten(2)


def _pack_six_bits(scales: Tensor) -> list[Tensor]:
    """Scales int8 [R, B, 8] to their upper bits [R, B, 2] and their lower bits [R, B, 4]."""
    unsigned = (scales + 32).view(torch.uint8)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=scales.device)
    upper = ((unsigned >> 4).unflatten(2, (-1, 4)) << shifts).sum(3, dtype=torch.uint8)
    pairs = unsigned.unflatten(2, (-1, 2))
    return [upper, (pairs[:, :, :, 0] & 15) | (pairs[:, :, :, 1] << 4)]


def _unpack_six_bits(upper: Tensor, lower: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=upper.device)
    high = ((upper.unsqueeze(3) >> shifts) & 3).flatten(2) << 4
    low = torch.stack((lower & 15, lower >> 4), 3).flatten(2)
    return (high | low).view(torch.int8) - 32
