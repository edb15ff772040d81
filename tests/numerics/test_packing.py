"""Packed words, against compressed-tensors' own packing and unpacking."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import code_range
from quantkit.numerics.packing import pack_columns, pack_rows, unpack_columns, unpack_rows


def make_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    smallest, largest = code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(smallest, largest + 1, (rows, columns), generator=generator).to(torch.int8)


sizes = st.integers(1, 41)
widths = st.sampled_from((4, 8))
seeds = st.integers(0, 99)


@given(rows=sizes, columns=sizes, bits=widths, seed=seeds)
def test_rows_are_packed_as_the_reader_packs_them(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    """Same words, and both unpack to the codes, for sizes that fill a word or not."""
    codes = make_codes(rows, columns, bits, seed)

    packed = pack_rows(codes, bits)

    assert packed.dtype == torch.int32
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
    assert torch.equal(unpack_rows(packed, bits, columns), codes)


@given(rows=sizes, columns=sizes, bits=widths, seed=seeds)
def test_zero_points_are_packed_along_rows_as_the_reader_packs_them(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    """Same words, and both unpack to the zero points, for odd row counts too."""
    values = make_codes(rows, columns, bits, seed)

    packed = pack_columns(values, bits)

    assert torch.equal(packed, pack_to_int32(values, bits, packed_dim=0))
    assert torch.equal(unpack_from_int32(packed, bits, values.shape, packed_dim=0), values)
    assert torch.equal(unpack_columns(packed, bits, rows), values)


def test_the_first_value_lies_in_the_lowest_bits() -> None:
    """-8 .. -1 become 0 .. 7 from the right to the left of the word."""
    codes = torch.arange(-8, 0, dtype=torch.int8).unsqueeze(0)

    assert pack_rows(codes, 4).item() == 0x76543210


def test_words_that_do_not_hold_the_columns_are_refused() -> None:
    """A damaged shape is an error, not a shorter tensor."""
    with pytest.raises(ValueError, match="2 words do not hold 17 values of 4 bits"):
        unpack_rows(torch.zeros(1, 2, dtype=torch.int32), 4, 17)


def test_widths_that_do_not_divide_a_byte_are_refused() -> None:
    """Three bits straddle words, which this packing does not do."""
    with pytest.raises(ValueError, match="3 bits"):
        pack_rows(torch.zeros(1, 8, dtype=torch.int8), 3)
