"""Codes, scales and zero points, against compressed-tensors' own arithmetic and by hand."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as reader_dequantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.numerics.affine import (
    choose_absmax,
    code_range,
    dequantize,
    quantize,
    round_scale,
    row_units,
)
from quantkit.schemes import SCHEMES, Scheme
from tests.solvers.cases import INTEGER_SCHEMES, SCALE_DTYPES, hard_weights, make_weight

schemes = st.sampled_from([SCHEMES[name] for name in INTEGER_SCHEMES])
dtypes = st.sampled_from(SCALE_DTYPES)


def test_symmetric_scale_of_four_bits_is_a_seventh_and_a_half_of_the_largest_weight() -> None:
    """max|w| / 7.5 and max|w| / 127.5, the convention of compressed-tensors."""
    weight = torch.tensor([[15.0, -3.0, 0.0, 1.0]])

    four, _ = choose_absmax(weight, SCHEMES["w4a16"], None, torch.float32)
    eight, _ = choose_absmax(weight, SCHEMES["w8a16"], None, torch.float32)

    assert four.item() == 2.0
    assert eight.item() == pytest.approx(15 / 127.5)


def test_asymmetric_range_includes_zero() -> None:
    """Weights 3 .. 15 get the range 0 .. 15: scale 1 and the smallest code for zero."""
    weight = torch.tensor([[3.0, 15.0, 4.0, 9.0]])

    scale, zero_point = choose_absmax(weight, SCHEMES["w4a16_asym"], None, torch.float32)
    codes = quantize(weight, scale, zero_point, SCHEMES["w4a16_asym"])

    assert scale.item() == 1.0
    assert zero_point is not None
    assert zero_point.item() == -8
    assert codes.tolist() == [[-5, 7, -4, 1]]
    assert torch.equal(dequantize(codes, scale, zero_point), weight)


@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_scales_and_zero_points_are_those_of_compressed_tensors(name: str) -> None:
    """In float32, where no rounding of the scale comes between."""
    scheme, weight = SCHEMES[name], make_weight(16, 64, seed=0)
    arguments = QuantizationArgs(
        num_bits=scheme.weight_bits, symmetric=scheme.symmetric, strategy="group", group_size=32
    )
    grouped = weight.reshape(16, 2, 32)
    expected_scale, expected_zero = calculate_qparams(grouped.amin(2), grouped.amax(2), arguments)

    scale, zero_point = choose_absmax(weight, scheme, 32, torch.float32)

    torch.testing.assert_close(scale, expected_scale)
    if zero_point is not None:
        assert torch.equal(zero_point, expected_zero.to(torch.int8))


@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_dequantized_weights_are_those_of_compressed_tensors(name: str) -> None:
    """The reader's own dequantization of our codes, scales and zero points."""
    scheme, weight = SCHEMES[name], make_weight(8, 96, seed=1)
    scale, zero_point = choose_absmax(weight, scheme, 32, torch.bfloat16)
    codes = quantize(weight, scale, zero_point, scheme)
    arguments = QuantizationArgs(
        num_bits=scheme.weight_bits, symmetric=scheme.symmetric, strategy="group", group_size=32
    )

    expected = reader_dequantize(codes, scale.float(), zero_point, args=arguments)

    assert torch.equal(expected, dequantize(codes, scale, zero_point))


@settings(max_examples=40, deadline=None)
@given(weight=hard_weights(rows=4, columns=64), scheme=schemes, dtype=dtypes)
def test_no_weight_makes_a_scale_or_a_dequantized_weight_infinite(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> None:
    """Zero, constant, huge and denormal rows get finite positive scales in every dtype."""
    scale, zero_point = choose_absmax(weight, scheme, 32, dtype)
    codes = quantize(weight, scale, zero_point, scheme)
    extremes = torch.tensor(code_range(scheme.weight_bits), dtype=torch.int8).repeat(4, 32)

    assert scale.dtype == dtype
    assert bool((scale.float() > 0).all())
    assert bool(dequantize(codes, scale, zero_point).isfinite().all())
    # Also for codes that no weight has chosen yet, in the arithmetic of a 16-bit reader.
    assert bool(dequantize(extremes, scale, zero_point).to(dtype).isfinite().all())


@settings(max_examples=40, deadline=None)
@given(weight=hard_weights(rows=4, columns=64), scheme=schemes)
def test_rounding_error_is_at_most_half_a_step(weight: torch.Tensor, scheme: Scheme) -> None:
    """With float32 scales nothing is clipped, so every weight is within half a step.

    A zero point is rounded itself, which can clip an extreme by one more half.
    """
    ordinary = (weight.abs().amax(1) < 1e30) & (weight.abs().amax(1) > 1e-30)
    weight = weight * ordinary.unsqueeze(1)
    scale, zero_point = choose_absmax(weight, scheme, 32, torch.float32)

    codes = quantize(weight, scale, zero_point, scheme)

    error = (dequantize(codes, scale, zero_point) - weight).reshape(len(weight), 2, 32).abs()
    steps = 0.5 if scheme.symmetric else 1.0
    assert bool((error <= steps * scale.unsqueeze(2) * 1.0001).all())


def test_a_zero_group_has_a_harmless_scale() -> None:
    """All-zero weights decode to zeros, and no reader divides by zero."""
    weight = torch.zeros(2, 64)
    for name in INTEGER_SCHEMES:
        scale, zero_point = choose_absmax(weight, SCHEMES[name], 32, torch.float16)
        codes = quantize(weight, scale, zero_point, SCHEMES[name])

        assert torch.equal(scale, torch.ones(2, 2, dtype=torch.float16))
        assert torch.equal(dequantize(codes, scale, zero_point), weight)


def test_codes_are_chosen_for_the_rounded_scale() -> None:
    """1/3 rounds up in bfloat16, and the code of 2.5 unrounded steps is that of fewer steps."""
    exact = torch.tensor([[1 / 3]])
    scale = round_scale(exact, SCHEMES["w4a16"], torch.bfloat16)
    weight = torch.tensor([[2.5005 / 3]])

    assert scale.item() > exact.item()
    assert quantize(weight, exact, None, SCHEMES["w4a16"]).item() == 3
    assert quantize(weight, scale, None, SCHEMES["w4a16"]).item() == 2


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    """The plan finds it first; the function says it too."""
    with pytest.raises(ValueError, match="64 does not divide 96"):
        choose_absmax(torch.zeros(2, 96), SCHEMES["w4a16"], 64, torch.float32)


@settings(max_examples=40, deadline=None)
@given(weight=hard_weights(rows=4, columns=32))
def test_row_units_divide_exactly(weight: torch.Tensor) -> None:
    """Powers of two: the division can be undone bit by bit, but for what vanishes beside a row."""
    unit = row_units(weight)
    scaled = weight / unit

    assert bool(torch.log2(unit).frac().eq(0).all())
    assert bool((scaled.abs() <= 512).all())
    counts = weight.abs() >= 1e-36 * weight.abs().amax(1, keepdim=True)
    assert torch.equal((scaled * unit)[counts], weight[counts])
    assert bool((scaled[~counts].abs() <= 1e-35).all())
