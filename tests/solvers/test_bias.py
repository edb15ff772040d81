"""Bias correction: the mean output error is gone, up to the rounding of the bias."""

from __future__ import annotations

import pytest
import torch

from quantkit.solvers import correct_bias
from tests.solvers.cases import make_weight
from tests.solvers.inputs import make_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_output_is_that_of_the_original_layer(dtype: torch.dtype) -> None:
    """Over all tokens, with rounded weights and rounded inputs."""
    weight, inputs = make_weight(8, 16, 0), make_inputs(16, 0) + 3.0
    decoded, rounded = weight + 0.1 * make_weight(8, 16, 1), inputs.round()
    bias = make_weight(1, 8, 2)[0].to(dtype)

    new = correct_bias(bias, weight, decoded, inputs.mean(0), rounded.mean(0))

    assert new.dtype == dtype
    before = (inputs @ weight.T).mean(0) + bias.float()
    without = (rounded @ decoded.T).mean(0) + bias.float()
    after = (rounded @ decoded.T).mean(0) + new.float()
    tolerance = torch.finfo(dtype).eps * new.float().abs() + 1e-5
    assert bool(((after - before).abs() <= tolerance).all())
    assert bool(((after - before).abs() <= (without - before).abs() + 1e-5).all())


def test_a_bias_too_coarse_to_take_up_anything_stays() -> None:
    """bfloat16 has no value between 128 and 129."""
    bias = torch.tensor([128.0]).bfloat16()
    weight, decoded = torch.tensor([[1.0]]), torch.tensor([[0.9]])

    assert torch.equal(correct_bias(bias, weight, decoded, torch.ones(1), torch.ones(1)), bias)
