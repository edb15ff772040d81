"""Searched scales are never worse than absmax scales on the objective they are searched for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, dequantize, quantize
from quantkit.numerics.joint_search import search_scales_jointly
from quantkit.numerics.scale_candidates import COARSE
from quantkit.numerics.scale_search import search_scales
from quantkit.schemes import SCHEMES, Scheme
from tests.solvers.cases import (
    DEVICES,
    INTEGER_SCHEMES,
    dtypes,
    error_in_units,
    exact_losses,
    group_sizes,
    hard_weights,
    make_moment,
    make_weight,
    schemes,
)


@settings(max_examples=40, deadline=None)
@given(
    weight=hard_weights(rows=3, columns=128),
    scheme=schemes,
    group_size=group_sizes,
    dtype=dtypes,
    seed=st.integers(0, 9),
)
def test_no_group_gets_worse_than_with_absmax_scales(
    weight: Tensor, scheme: Scheme, group_size: int | None, dtype: torch.dtype, seed: int
) -> None:
    """The weighted squared error of each group, in float64."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(128, generator=generator) ** 4

    found = search_scales(weight, scheme, group_size, dtype, importance)

    plain = choose_absmax(weight, scheme, group_size, dtype)
    shape = (*plain[0].shape, -1)

    def cost(pair: tuple[Tensor, Tensor | None]) -> Tensor:
        error = error_in_units(weight, pair, scheme)
        return (error.square() * importance.double()).reshape(shape).sum(2)

    assert bool(found[0].isfinite().all())
    assert bool((cost(found) <= cost(plain) * (1 + 1e-5)).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_the_search_finds_clearly_better_scales_on_realistic_weights(
    name: str, device: str
) -> None:
    """Heavy tails and correlated inputs: at least a tenth less error for either objective."""
    scheme = SCHEMES[name]
    weight, moment = make_weight(64, 128, seed=0).to(device), make_moment(128, seed=0).to(device)
    importance = moment.diagonal()
    plain = choose_absmax(weight, scheme, 64, torch.bfloat16)

    separate = search_scales(weight, scheme, 64, torch.bfloat16, importance)
    joint = search_scales_jointly(weight, scheme, 64, torch.bfloat16, moment, sweeps=2)

    diagonal = importance.diag()
    pairs = (plain, separate, (joint.scale, joint.zero_point))
    errors = [error_in_units(weight, pair, scheme) for pair in pairs]
    assert exact_losses(errors[1], diagonal).sum() < 0.9 * exact_losses(errors[0], diagonal).sum()
    assert exact_losses(errors[2], moment).sum() < 0.9 * exact_losses(errors[0], moment).sum()


def test_a_scale_that_serves_the_one_important_column_is_found() -> None:
    """4.5 is half a step off under absmax, whose step is 1, and a code under steps of 0.9."""
    weight = torch.tensor([[4.5, 7.5, -1.0, 0.0]])
    importance = torch.tensor([1.0, 0.0, 0.0, 0.0])
    scheme = SCHEMES["w4a16"]

    scale, _ = search_scales(weight, scheme, None, torch.float32, importance)

    value = dequantize(quantize(weight, scale, None, scheme), scale, None)[0, 0]
    assert value.item() == pytest.approx(4.5, abs=1e-5)


def test_importance_can_differ_between_rows() -> None:
    """Each row with its own weights is the row searched alone with them."""
    weight = make_weight(6, 64, seed=8)
    importance = torch.rand(6, 64, generator=torch.Generator().manual_seed(0)) ** 3
    scheme = SCHEMES["w4a16_asym"]

    together = search_scales(weight, scheme, 32, torch.bfloat16, importance)
    alone = [
        search_scales(weight[row : row + 1], scheme, 32, torch.bfloat16, importance[row])
        for row in range(6)
    ]

    assert torch.equal(together[0], torch.cat([scale for scale, _ in alone]))


def test_a_coarse_grid_lies_between_absmax_and_the_fine_grid() -> None:
    """It is for ranking, and still better than nothing."""
    weight, moment = make_weight(32, 128, seed=6), make_moment(128, seed=6)
    scheme = SCHEMES["w4a16"]
    importance = moment.diagonal()

    found = [
        choose_absmax(weight, scheme, 32, torch.bfloat16),
        search_scales(weight, scheme, 32, torch.bfloat16, importance, COARSE),
        search_scales(weight, scheme, 32, torch.bfloat16, importance),
    ]

    losses = [
        float(exact_losses(error_in_units(weight, pair, scheme), importance.diag()).sum())
        for pair in found
    ]
    assert losses[0] > losses[1] > losses[2]


def test_blocks_are_searched_as_one_group_each() -> None:
    """The importance-weighted error of every block, ragged ones too, by loops in float64."""
    weight, scheme = make_weight(140, 200, seed=9), SCHEMES["fp8_block"]
    importance = torch.rand(200, generator=torch.Generator().manual_seed(1)) ** 3

    found = search_scales(weight, scheme, None, torch.bfloat16, importance)

    plain = choose_absmax(weight, scheme, None, torch.bfloat16)
    assert found[0].shape == plain[0].shape == (2, 2)
    costs = []
    for scale, _ in (plain, found):
        spread = scale.float().repeat_interleave(128, 0)[:140].repeat_interleave(128, 1)[:, :200]
        rounded = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn).float() * spread
        cost = (rounded - weight).double().square() * importance.double()
        costs.append([part.sum() for rows in cost.split(128) for part in rows.split(128, dim=1)])
    assert all(new <= old for old, new in zip(*costs, strict=True))
    assert sum(costs[1]) < sum(costs[0])
