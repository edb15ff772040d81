"""Bytes of the K-quants: super-blocks of 256 weights, as ggml-common.h lays them out.

Codes lie in planes: a byte holds the bits of weights that are a run (mostly 32) apart, the first of
them in its lowest bits. What is signed is stored shifted to start at 0, but for the scales of Q6_K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.ggml.blocks import GgmlBlocks

SUPER_BLOCK = 256
_SIX_BIT_TYPES = ("Q4_K", "Q5_K")
"""Types whose sub-blocks have scales and minimums of six bits."""
_HALF = 2
"""Bytes of a float16."""
_SIX_BIT_SCALES = 12
"""Bytes of 16 six-bit integers."""


def pack_k(blocks: GgmlBlocks) -> Tensor:
    """Return the bytes of rows in a K-quant, uint8 [R, row bytes]."""
    kind, rows = blocks.type, len(blocks.codes)
    codes = (blocks.codes - kind.codes[0]).view(torch.uint8).reshape(-1, SUPER_BLOCK)
    d = _bytes_of(blocks.d)
    super_blocks = len(codes)
    scales = _unsigned(blocks.sub_scales, super_blocks)
    if kind.name == "Q6_K":
        parts = [_pack_planes(codes & 15, 4, run=64), _pack_planes(codes >> 4, 2), scales, d]
    elif kind.name == "Q3_K":
        parts = [_pack_planes(codes >> 2, 1), _pack_planes(codes & 3, 2), _pack_q3(scales + 32), d]
    else:
        assert blocks.m is not None
        m, minimums = _bytes_of(blocks.m), _unsigned(blocks.sub_minimums, super_blocks)
        if kind.name == "Q2_K":
            parts = [scales | minimums << 4, _pack_planes(codes, 2), d, m]
        else:
            high = [_pack_planes(codes >> 4, 1)] if kind.name == "Q5_K" else []
            parts = [d, m, pack_six_bits(scales, minimums), *high, _pack_planes(codes & 15, 4)]
    return torch.cat(parts, dim=1).reshape(rows, -1)


def unpack_k(kind: GgmlType, data: Tensor) -> GgmlBlocks:
    """Return the codes and scales of uint8 [R, row bytes] in a K-quant.

    Raises:
        ValueError: the type is no K-quant.
    """
    rows = len(data)
    data = data.reshape(-1, kind.block_bytes)
    m = minimums = None
    if kind.name == "Q6_K":
        low, high, scales, d = data.split([128, 64, 16, _HALF], dim=1)
        codes = _unpack_planes(low, 4, run=64) | _unpack_planes(high, 2) << 4
    elif kind.name == "Q3_K":
        high, low, packed, d = data.split([32, 64, _SIX_BIT_SCALES, _HALF], dim=1)
        codes = _unpack_planes(low, 2) | _unpack_planes(high, 1) << 2
        scales = _unpack_q3(packed) - 32
    elif kind.name == "Q2_K":
        packed, low, d, m = data.split([16, 64, _HALF, _HALF], dim=1)
        codes = _unpack_planes(low, 2)
        scales, minimums = packed & 15, packed >> 4
    elif kind.name not in _SIX_BIT_TYPES:
        raise ValueError(f"{kind.name} is no K-quant")
    else:
        high_bytes = 32 if kind.name == "Q5_K" else 0
        sizes = [_HALF, _HALF, _SIX_BIT_SCALES, high_bytes, 128]
        d, m, packed, high, low = data.split(sizes, dim=1)
        codes = _unpack_planes(low, 4)
        if high_bytes:
            codes |= _unpack_planes(high, 1) << 4
        scales, minimums = unpack_six_bits(packed)
    return GgmlBlocks(
        type=kind,
        codes=_signed(codes, rows) + kind.codes[0],
        d=_halves(d, rows),
        m=None if m is None else _halves(m, rows),
        sub_scales=_signed(scales, rows),
        sub_minimums=None if minimums is None else _signed(minimums, rows),
    )


def _pack_planes(values: Tensor, bits: int, run: int = 32) -> Tensor:
    """Pack values of some bits, uint8 [N, V], into bytes [N, V * bits / 8]."""
    word, _ = _word_of(run, bits)
    planes = values.view(word).unflatten(1, (-1, 8 // bits, run // word.itemsize))
    result = planes[:, :, 0].clone()
    for place in range(1, 8 // bits):
        result |= planes[:, :, place] << bits * place
    return result.flatten(1).view(torch.uint8)


def _unpack_planes(data: Tensor, bits: int, run: int = 32) -> Tensor:
    """Undo `_pack_planes`."""
    word, mask = _word_of(run, bits)
    shifts = torch.arange(0, 8, bits, dtype=word, device=data.device)
    planes = data.contiguous().view(word).unflatten(1, (-1, 1, run // word.itemsize))
    return (planes >> shifts[:, None] & mask).flatten(1).view(torch.uint8)


def _word_of(run: int, bits: int) -> tuple[torch.dtype, int]:
    """Return what holds several bytes of a run, to shift them at once, and its mask of low bits.

    No value reaches into the next byte, be it shifted up; what is shifted down is masked.
    """
    word = torch.int64 if run % 8 == 0 else torch.int32
    low = (1 << bits) - 1
    return word, int.from_bytes(bytes([low] * word.itemsize), "little")


def _pack_q3(scales: Tensor) -> Tensor:
    """Pack six-bit scales, uint8 [N, 16]: the low four bits of all, then the high two."""
    low = _pack_planes(scales & 15, 4, run=8)
    return torch.cat([low, _pack_planes(scales >> 4, 2, run=4)], dim=1)


def _unpack_q3(packed: Tensor) -> Tensor:
    low, high = packed.split([8, 4], dim=1)
    return _unpack_planes(low, 4, run=8) | _unpack_planes(high, 2, run=4) << 4


def pack_six_bits(scales: Tensor, minimums: Tensor) -> Tensor:
    """Pack six-bit scales and minimums, uint8 [N, 8] each.

    The first four of either have a byte each, whose two free bits hold the high bits of the last
    four; the low bits of those follow.
    """
    first_scales, last_scales = scales.split(4, dim=1)
    first_minimums, last_minimums = minimums.split(4, dim=1)
    parts = [
        first_scales | (last_scales >> 4) << 6,
        first_minimums | (last_minimums >> 4) << 6,
        last_scales & 15 | last_minimums << 4,
    ]
    return torch.cat(parts, dim=1)


def unpack_six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `pack_six_bits`."""
    scales, minimums, low = packed.split(4, dim=1)
    last_scales = low & 15 | (scales >> 6) << 4
    last_minimums = low >> 4 | (minimums >> 6) << 4
    return (
        torch.cat([scales & 63, last_scales], dim=1),
        torch.cat([minimums & 63, last_minimums], dim=1),
    )


def _unsigned(integers: Tensor | None, super_blocks: int) -> Tensor:
    """Return int8 [R, S] as the uint8 of the same bits, a row for each super-block."""
    assert integers is not None
    return integers.contiguous().view(torch.uint8).reshape(super_blocks, -1)


def _bytes_of(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.uint8).reshape(-1, _HALF)


def _halves(data: Tensor, rows: int) -> Tensor:
    return data.contiguous().view(torch.float16).reshape(rows, -1)


def _signed(values: Tensor, rows: int) -> Tensor:
    return values.contiguous().view(torch.int8).reshape(rows, -1)
