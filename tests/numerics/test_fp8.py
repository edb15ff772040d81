"""float8_e4m3fn codes, against a decoder and an encoder written from the format's definition."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as reader_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import (
    choose_absmax,
    decode,
    dequantize,
    quantize,
    round_second,
    row_units,
)
from quantkit.numerics.fp8 import divide_blocks, gather_blocks, multiply_blocks, round_to_fp8
from quantkit.schemes import SCHEMES
from tests.solvers.cases import DEVICES, SCALE_DTYPES, hard_weights, make_weight


def decode_bits(code: int) -> float | None:
    """The value of a code from its bits; None for the two that are not a number."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return None
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


VALUES = sorted(value for code in range(128) if (value := decode_bits(code)) is not None)
"""The non-negative values; the index of a value is its code."""


def encode_slowly(value: float) -> float:
    """The value nearest to a float, ties to the even code, saturating."""
    size = min(abs(value), VALUES[-1])
    above = bisect_left(VALUES, size)
    below = max(0, above - 1)
    to_above, to_below = VALUES[above] - size, size - VALUES[below]
    nearest = above if to_above < to_below or (to_above == to_below and above % 2 == 0) else below
    return -VALUES[nearest] if value < 0 else VALUES[nearest]


def hard_values() -> list[float]:
    """Every value, every tie between two, both sides of each, and what saturates."""
    ties = [(low + high) / 2 for low, high in pairwise(VALUES)]
    sides = [tie * (1 + sign * 2.0**-20) for tie in ties for sign in (-1, 1)]
    positive = [*VALUES, *ties, *sides, 449.0, 464.0, 480.0, 1e9, 3e38, 1e-30, 1e-45]
    return [sign * value for value in positive for sign in (1, -1)]


def test_torch_decodes_every_code_as_the_format_defines_it() -> None:
    """All 256 of them: 253 numbers, two zeros among them the same, and two that are no number."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)

    for code, value in enumerate(codes.float().tolist()):
        expected = decode_bits(code)
        assert (value != value) if expected is None else (value == expected)


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_is_the_slow_encoder_and_the_clamped_cast(device: str) -> None:
    """Every value, tie and neighbourhood, subnormals and saturation."""
    values = torch.tensor(hard_values(), dtype=torch.float32)

    rounded = round_to_fp8(values.to(device)).cpu()

    assert rounded.tolist() == [encode_slowly(value) for value in values.tolist()]
    cast = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(rounded, cast.float())
    assert torch.equal(rounded.to(torch.float8_e4m3fn).view(torch.uint8), cast.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_any_float_is_rounded_as_by_the_cast(values: list[float]) -> None:
    """Infinities saturate like all that is too large."""
    tensor = torch.tensor(values)

    rounded = round_to_fp8(tensor.clone())

    assert torch.equal(rounded, tensor.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_the_second_nearest_value_is_the_neighbour_on_the_other_side() -> None:
    """By the list of all values; where there is none it is the nearest itself."""
    scheme = SCHEMES["fp8_dynamic"]
    values = torch.tensor(hard_values(), dtype=torch.float32).clamp_(-500, 500)
    nearest = round_to_fp8(values.clone())
    every = sorted({-value for value in VALUES} | set(VALUES))

    second = round_second(values, nearest, scheme, None)

    for value, first, other in zip(values.tolist(), nearest.tolist(), second.tolist(), strict=True):
        if value == first or abs(value) > 448:
            assert other == first
        else:
            index = every.index(first) + (1 if value > first else -1)
            assert other == every[index]


def test_the_second_nearest_integer_stays_within_the_codes() -> None:
    """Without and with a zero point, whose values are codes less zero points."""
    values = torch.tensor([0.3, -0.3, 7.2, -8.4, 2.0])
    nearest = values.round()

    symmetric = round_second(values, nearest, SCHEMES["w4a16"], None)
    shifted = round_second(values, nearest, SCHEMES["w4a16_asym"], torch.tensor(-1.0))

    assert symmetric.tolist() == [1.0, -1.0, 7.0, -8.0, 2.0]
    assert shifted.tolist() == [1.0, -1.0, 8.0, -7.0, 2.0]


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 300), (5, 200), (256, 64)])
def test_blocks_are_scaled_one_by_one(shape: tuple[int, int]) -> None:
    """Against loops over the blocks; those at the edges are smaller."""
    rows, columns = shape
    weight = make_weight(rows, columns, seed=0)
    scheme = SCHEMES["fp8_block"]

    scale, zero_point = choose_absmax(weight, scheme, None, torch.float32)
    codes = quantize(weight, scale, zero_point, scheme)
    found = decode(codes, scale, zero_point, scheme)

    assert zero_point is None
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            at = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            expected_scale = weight[at].abs().max() / 448
            expected = (weight[at] / expected_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(scale[row, column], expected_scale)
            assert torch.equal(codes[at].float(), expected.float())
            assert torch.equal(found[at], expected.float() * expected_scale)


@pytest.mark.parametrize("strategy", ["channel", "block"])
def test_dequantized_weights_are_those_of_compressed_tensors(strategy: str) -> None:
    """The reader's own dequantization of our codes and scales."""
    scheme = SCHEMES["fp8_dynamic" if strategy == "channel" else "fp8_block"]
    weight = make_weight(256, 384, seed=1)
    scale, _ = choose_absmax(weight, scheme, None, torch.bfloat16)
    codes = quantize(weight, scale, None, scheme)
    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    arguments = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **block)

    expected = reader_dequantize(codes, scale.float(), args=arguments, dtype=torch.float32)

    assert torch.equal(expected, decode(codes, scale, None, scheme))


@settings(max_examples=40, deadline=None)
@given(
    weight=hard_weights(rows=3, columns=160),
    name=st.sampled_from(("fp8_dynamic", "fp8_block")),
    dtype=st.sampled_from(SCALE_DTYPES),
)
def test_no_weight_makes_a_code_that_is_no_number(
    weight: Tensor, name: str, dtype: torch.dtype
) -> None:
    """Zero, constant, huge and denormal rows, also where they share a scale."""
    scheme = SCHEMES[name]
    scale, _ = choose_absmax(weight, scheme, None, dtype)

    codes = quantize(weight, scale, None, scheme)

    assert scale.dtype == dtype
    assert bool((scale.float() > 0).all())
    assert bool(codes.float().isfinite().all())
    # Also in the arithmetic of a 16-bit reader.
    assert bool(decode(codes, scale, None, scheme).to(dtype).isfinite().all())


def test_gathered_blocks_hold_every_weight_of_their_block() -> None:
    """The order within a block does not matter: the sums are those of the blocks."""
    weight = make_weight(200, 300, seed=2)

    blocks = gather_blocks(weight)

    assert blocks.shape == (2, 3, 128 * 128)
    sums = [[part.sum() for part in row.split(128, dim=1)] for row in weight.split(128)]
    torch.testing.assert_close(blocks.sum(2), torch.tensor(sums))


def test_division_by_block_scales_undoes_multiplication() -> None:
    """Powers of two leave no rounding; the matrix is changed in place."""
    weight = make_weight(130, 140, seed=3)
    scale = torch.tensor([[2.0, 0.5], [4.0, 0.25]])

    changed = weight.clone()
    assert multiply_blocks(changed, scale) is changed
    assert torch.equal(changed[129:, 128:], weight[129:, 128:] * 0.25)
    assert torch.equal(divide_blocks(changed, scale), weight)


def test_rows_that_share_their_scales_share_their_unit() -> None:
    """128 rows have that of the largest weight among them."""
    weight = torch.ones(130, 4)
    weight[3] = 100.0
    weight[129] = 0.1

    unit = row_units(weight, SCHEMES["fp8_block"])

    assert unit.squeeze(1).tolist() == [128.0] * 128 + [2.0] * 2
    assert torch.equal(row_units(weight, SCHEMES["fp8_dynamic"]), row_units(weight))


def test_a_channel_scale_is_a_448th_of_the_largest_weight() -> None:
    """In float32; the largest weight gets the largest code."""
    weight, scheme = torch.tensor([[224.0, -1.0, 0.0]]), SCHEMES["fp8_dynamic"]

    scale, _ = choose_absmax(weight, scheme, None, torch.float32)
    codes = quantize(weight, scale, None, scheme)

    assert scale.item() == 0.5
    assert codes.float().tolist() == [[448.0, -2.0, 0.0]]
    assert torch.equal(dequantize(codes, scale, None), weight)
