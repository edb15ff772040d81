"""Packing of small signed integers into 32-bit words, as compressed-tensors stores them, and of
pairs of rows into bytes, as ModelOpt does.

In words every value is shifted by 2**(bits-1) to be unsigned; the first value along the packed
dimension lies in the lowest bits of a word; the last word is filled up with zero bits. Format:
`pack_to_int32` of compressed-tensors 0.20, for widths that divide 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics import kernels

_WIDTHS = (1, 2, 4, 8)


def _check_width(bits: int) -> None:
    if bits not in _WIDTHS:
        raise ValueError(f"cannot pack values of {bits} bits into words (known: {_WIDTHS})")


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [O, I] along I into int32 [O, ceil(I * bits / 32)].

    Raises:
        ValueError: `bits` does not divide a byte.
    """
    _check_width(bits)
    if kernels.kernels_available(codes.device):
        return kernels.pack_rows(codes, bits)
    per_byte, per_word = 8 // bits, 32 // bits
    fill = -codes.shape[1] % per_word
    # Padded after the shift, so that the filling bits are zeros.
    unsigned = torch.nn.functional.pad(
        (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), (0, fill)
    )
    lanes = unsigned.reshape(codes.shape[0], -1, per_byte)
    packed = lanes[:, :, 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[:, :, lane] << (lane * bits)
    return packed.view(torch.int32)


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack int32 [O, ceil(columns * bits / 32)] to int8 codes [O, columns].

    Raises:
        ValueError: `bits` does not divide a byte, or the words do not hold `columns` values.
    """
    _check_width(bits)
    per_byte, per_word = 8 // bits, 32 // bits
    if packed.shape[1] != -(-columns // per_word):
        raise ValueError(f"{packed.shape[1]} words do not hold {columns} values of {bits} bits")
    lanes = packed.contiguous().view(torch.uint8).unsqueeze(2)
    shifts = torch.arange(per_byte, device=packed.device, dtype=torch.uint8) * bits
    unsigned = (lanes >> shifts) & ((1 << bits) - 1)
    codes = unsigned.to(torch.int16) - (1 << (bits - 1))
    return codes.reshape(packed.shape[0], -1)[:, :columns].to(torch.int8)


def pack_columns(values: Tensor, bits: int) -> Tensor:
    """Pack int8 values [O, G] along O into int32 [ceil(O * bits / 32), G] (zero points)."""
    return pack_rows(values.T.contiguous(), bits).T.contiguous()


def unpack_columns(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Unpack int32 [ceil(rows * bits / 32), G] to int8 values [rows, G]."""
    return unpack_rows(packed.T.contiguous(), bits, rows).T.contiguous()


def pack_row_pairs(codes: Tensor) -> Tensor:
    """Pack signed 4-bit codes, int8 [O, I], along O into uint8 [O / 2, I].

    The even row lies in the low half of a byte, both in two's complement: `pack_int4_in_uint8` of
    ModelOpt 0.47 (torch/export/quant_utils.py).

    Raises:
        ValueError: the number of rows is odd.
    """
    if len(codes) % 2:
        raise ValueError(f"{len(codes)} rows of 4-bit codes are not pairs")
    halves = codes.view(torch.uint8) & 0x0F
    return halves[0::2] | (halves[1::2] << 4)


def unpack_row_pairs(packed: Tensor) -> Tensor:
    """Unpack uint8 [O / 2, I] to signed 4-bit codes, int8 [O, I]."""
    # Shifted up and down again as a signed number, the highest bit of a half is its sign.
    low = (packed << 4).view(torch.int8) >> 4
    high = packed.view(torch.int8) >> 4
    return torch.stack([low, high], dim=1).reshape(-1, packed.shape[1])
