"""The rounding of inputs against compressed-tensors' own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from quantkit.numerics.activations import round_inputs, scale_from_absmax
from quantkit.schemes import SCHEMES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DYNAMIC = {
    "w8a8": {"type": "int", "strategy": "token"},
    "w4a8": {"type": "int", "strategy": "token"},
    "w4a8_fp8": {"type": "float", "strategy": "token"},
    "fp8_dynamic": {"type": "float", "strategy": "token"},
    "fp8_block": {"type": "float", "strategy": "group", "group_size": 128},
}
STATIC = {"w8a8_static": "int", "fp8_static": "float"}


def make_inputs(dtype: torch.dtype, features: int = 256) -> Tensor:
    """Uneven channels, a token of zeros, a group of zeros and an outlier: [2, 9, features]."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 9, features, generator=generator)
    inputs *= torch.exp(2 * torch.randn(features, generator=generator))
    inputs[0, 0] = 0.0
    inputs[1, 2, : features // 2] = 0.0
    inputs[0, 3, 5] = 2000.0
    return inputs.to(dtype)


def args_of(**settings: object) -> QuantizationArgs:
    """compressed-tensors' description of eight symmetric bits."""
    return QuantizationArgs(num_bits=8, symmetric=True, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", list(DYNAMIC))
def test_dynamic_inputs_are_rounded_as_compressed_tensors_does_it(
    scheme: str, dtype: torch.dtype
) -> None:
    """Each token by its own scale, or each 128 columns of it; values and dtype agree."""
    inputs = make_inputs(dtype)
    args = args_of(dynamic=True, **DYNAMIC[scheme])
    scale, zero_point = compute_dynamic_scales_and_zp(inputs, args, torch.nn.Module())

    found = round_inputs(inputs, SCHEMES[scheme])

    expected = fake_quantize(inputs, scale, zero_point, args)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", list(STATIC))
def test_static_inputs_are_rounded_as_compressed_tensors_does_it(
    scheme: str, dtype: torch.dtype
) -> None:
    """One scale for all, which may clip; of any dtype, since a model is loaded in one."""
    inputs, scale = make_inputs(dtype), torch.tensor([0.37]).bfloat16()
    args = args_of(type=STATIC[scheme], strategy="tensor")

    found = round_inputs(inputs, SCHEMES[scheme], scale)

    loaded = scale.to(dtype)
    expected = fake_quantize(inputs, loaded, torch.zeros(1, dtype=torch.int8), args)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_narrow_inputs_of_a_scheme_in_blocks_have_one_scale_a_token() -> None:
    """Fewer than 128 columns are one group, as in compressed-tensors."""
    inputs = make_inputs(torch.float32, features=64)

    assert torch.equal(
        round_inputs(inputs, SCHEMES["fp8_block"]), round_inputs(inputs, SCHEMES["fp8_dynamic"])
    )


def test_inputs_in_16_bits_come_back_as_they_are() -> None:
    """Nothing is copied."""
    inputs = make_inputs(torch.bfloat16)

    assert round_inputs(inputs, SCHEMES["w4a16"]) is inputs


def test_the_inputs_are_not_changed() -> None:
    """Not even where the rounding works in place on what it made."""
    for scheme, scale in (("w8a8", None), ("fp8_block", None), ("fp8_static", torch.ones(1))):
        inputs = make_inputs(torch.float32)

        round_inputs(inputs, SCHEMES[scheme], scale)

        assert torch.equal(inputs, make_inputs(torch.float32))


def test_a_scale_belongs_to_static_schemes_alone() -> None:
    """One too many and one too few are mistakes of the caller."""
    inputs = torch.ones(2, 8)
    for scheme, scale in (("w8a8", torch.ones(1)), ("w8a8_static", None)):
        with pytest.raises(ValueError, match="static activations"):
            round_inputs(inputs, SCHEMES[scheme], scale)
    with pytest.raises(ValueError, match="do not divide 200"):
        round_inputs(torch.ones(2, 200), SCHEMES["fp8_block"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", list(STATIC))
def test_a_scale_from_absmax_clips_next_to_nothing(scheme: str, dtype: torch.dtype) -> None:
    """Its rounding to the stored dtype, and the missing code 128, are all that is lost."""
    activations = SCHEMES[scheme].activations
    assert activations is not None
    largest = torch.tensor(37.3)

    scale = scale_from_absmax(largest, activations, dtype)

    assert scale.shape == (1,)
    assert scale.dtype == dtype
    found = round_inputs(largest.reshape(1, 1), SCHEMES[scheme], scale.float())
    assert float(found) == pytest.approx(37.3, rel=0.01)


def test_a_scale_from_absmax_is_never_zero_or_infinite() -> None:
    """An input that is always zero, and one beyond what the dtype holds."""
    activations = SCHEMES["w8a8_static"].activations
    assert activations is not None
    for largest in (0.0, 1e-30, 3e38):
        scale = scale_from_absmax(torch.tensor(largest), activations, torch.float16)
        assert 0 < float(scale) < float("inf")
