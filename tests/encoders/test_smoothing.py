"""The division of an input's channels is chosen where it helps, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.encoders.simulation import find_grid, round_to_codes
from quantkit.encoders.smoothing import choose_division
from quantkit.records import InputStats, LinearPlan
from tests.encoders.cases import make_case


def _stats(inputs: Tensor) -> InputStats:
    return InputStats(
        second_moment=inputs.T @ inputs / len(inputs),
        mean=inputs.mean(0),
        absmax=inputs.abs().amax(0),
        minimum=float(inputs.min()),
        maximum=float(inputs.max()),
        counts=np.zeros(0, np.int64),
        sample=inputs,
        tokens=len(inputs),
        lowest=inputs.amin(0),
        highest=inputs.amax(0),
    )


def _linear(folder: Path) -> LinearPlan:
    return make_case(folder).plan.groups[0].linears[0]


def _error(inputs: Tensor, weight: Tensor, scale: Tensor) -> float:
    """Squared output error with inputs and weights of eight bits."""
    divided, scaled = inputs / scale, weight * scale
    grid = find_grid(divided.min(), divided.max())
    step = scaled.abs().amax(1, keepdim=True) / 127
    product = round_to_codes(divided, *grid) * grid[0] @ ((scaled / step).round() * step).T
    return float((product - inputs @ weight.T).square().sum())


def test_large_channels_are_evened_out(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, 32, generator=generator)
    inputs[:, 4] *= 60.0
    weight = torch.randn(24, 32, generator=generator)
    choice = choose_division([weight], _stats(inputs), [_linear(tmp_path)], 1.0)
    assert choice.exponent is not None
    assert int(choice.scale.argmax()) == 4
    unseen = torch.randn(400, 32, generator=generator)
    unseen[:, 4] *= 60.0
    plain = _error(unseen, weight, torch.ones(32))
    assert _error(unseen, weight, choice.scale) < plain / 5
    assert choice.loss < choice.identity_loss / 5


def test_even_channels_are_left_alone(tmp_path: Path) -> None:
    """No division is worth its time there."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(400, 32, generator=generator) - 0.5
    weight = torch.rand(24, 32, generator=generator) - 0.5
    choice = choose_division([weight], _stats(inputs), [_linear(tmp_path)], 1.0)
    assert choice.exponent is None
    assert torch.equal(choice.scale, torch.ones(32))


def test_a_channel_that_single_tokens_have_is_not_evened_out(tmp_path: Path) -> None:
    """What one half of the tokens has not seen clips the other half's largest values."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, 32, generator=generator)
    inputs[:, 4] *= 0.01
    inputs[17, 4] = 3.0
    weight = torch.randn(24, 32, generator=generator)
    stats = _stats(inputs)
    choice = choose_division([weight], stats, [_linear(tmp_path)], 1.0)
    assert _error(inputs, weight, choice.scale) <= _error(inputs, weight, torch.ones(32))


def test_one_token_decides_nothing(tmp_path: Path) -> None:
    inputs = torch.tensor([[1.0, 50.0]])
    choice = choose_division([torch.ones(3, 2)], _stats(inputs), [_linear(tmp_path)], 1.0)
    assert choice.exponent is None


def test_dead_channels_give_finite_scales(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(100, 8, generator=generator)
    inputs[:, 0] = 0.0
    inputs[:, 1] *= 100.0
    weight = torch.randn(6, 8, generator=generator)
    weight[:, 2] = 0.0
    choice = choose_division([weight], _stats(inputs), [_linear(tmp_path)], 1.0)
    assert choice.exponent is not None
    assert bool(choice.scale.isfinite().all())
    assert float(choice.scale.min()) > 0
