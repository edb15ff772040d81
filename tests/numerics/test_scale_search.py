"""Searched scales are never worse than absmax scales on the objective they are searched for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, dequantize, quantize
from quantkit.numerics.scale_search import COARSE, search_scales, search_scales_jointly
from quantkit.records import LayerStats
from quantkit.schemes import SCHEMES, Scheme
from tests.solvers.cases import (
    DEVICES,
    INTEGER_SCHEMES,
    exact_losses,
    hard_stats,
    hard_weights,
    make_moment,
    make_weight,
)

schemes = st.sampled_from([SCHEMES[name] for name in INTEGER_SCHEMES])
group_sizes = st.sampled_from((32, 64, None))
dtypes = st.sampled_from((torch.bfloat16, torch.float16))


def error_in_units(weight: Tensor, found: tuple[Tensor, Tensor | None], scheme: Scheme) -> Tensor:
    """Rounding errors [O, I] in float64, relative to the largest weight of the row."""
    codes = quantize(weight, *found, scheme)
    error = dequantize(codes, *found).double() - weight.double()
    return error / weight.double().abs().amax(1, keepdim=True).clamp(min=1e-45)


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


@settings(max_examples=40, deadline=None)
@given(
    weight=hard_weights(rows=3, columns=128),
    scheme=schemes,
    group_size=group_sizes,
    dtype=dtypes,
    stats=hard_stats(columns=128),
)
def test_no_row_gets_worse_than_with_absmax_scales(
    weight: Tensor, scheme: Scheme, group_size: int | None, dtype: torch.dtype, stats: LayerStats
) -> None:
    """e H e^T of each row in float64, up to the resolution of the float32 search."""
    moment = stats.second_moment

    search = search_scales_jointly(weight, scheme, group_size, dtype, moment, sweeps=2)

    found = search.scale, search.zero_point
    plain = choose_absmax(weight, scheme, group_size, dtype)
    before, after = (error_in_units(weight, pair, scheme) for pair in (plain, found))
    resolution = 1e-5 * before.square().sum(1) * moment.diagonal().sum()
    assert bool(found[0].isfinite().all())
    assert bool((exact_losses(after, moment) <= exact_losses(before, moment) + resolution).all())


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


def test_rows_are_searched_independently() -> None:
    """The result of a row does not depend on which rows are searched beside it."""
    weight, moment = make_weight(12, 64, seed=4), make_moment(64, seed=4)
    scheme = SCHEMES["w4a16_asym"]

    together = search_scales_jointly(weight, scheme, 32, torch.bfloat16, moment, 2)
    alone = [
        search_scales_jointly(row, scheme, 32, torch.bfloat16, moment, 2) for row in weight.split(1)
    ]

    assert torch.equal(together.scale, torch.cat([row.scale for row in alone]))


def test_a_channel_scale_is_the_same_as_scaling_weight_and_moment() -> None:
    """Codes for W * s under H / (s s^T) are those for W with channel scale s under H."""
    weight, moment = make_weight(8, 64, seed=5), make_moment(64, seed=5)
    channel = torch.exp2(torch.arange(64) % 5 - 2.0)
    scheme = SCHEMES["w4a16"]

    scaled = search_scales_jointly(
        weight * channel, scheme, 32, torch.bfloat16, moment / channel / channel.unsqueeze(1), 1
    )
    given_apart = search_scales_jointly(
        weight, scheme, 32, torch.bfloat16, moment, 1, channel_scale=channel.expand_as(weight)
    )

    assert torch.equal(scaled.scale, given_apart.scale)
    torch.testing.assert_close(scaled.losses, given_apart.losses)


def test_the_losses_are_those_of_the_scales_before_and_after() -> None:
    """Against float64, in the units of the weights."""
    weight, moment = make_weight(16, 128, seed=7), make_moment(128, seed=7)
    scheme = SCHEMES["w4a16_asym"]

    search = search_scales_jointly(weight, scheme, 32, torch.bfloat16, moment, sweeps=2)

    for losses, pair in (
        (search.losses, (search.scale, search.zero_point)),
        (search.plain_losses, choose_absmax(weight, scheme, 32, torch.bfloat16)),
    ):
        error = dequantize(quantize(weight, *pair, scheme), *pair) - weight
        torch.testing.assert_close(losses, exact_losses(error, moment), rtol=1e-4, atol=0)


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


def test_wide_groups_are_searched_among_the_best_by_the_diagonal() -> None:
    """640 columns of one group: never worse than absmax, and nearly as good as all candidates."""
    weight, moment = make_weight(8, 640, seed=10), make_moment(640, seed=10)
    for name in ("w4a16", "w4a16_asym", "fp8_dynamic"):
        scheme = SCHEMES[name]

        search = search_scales_jointly(weight, scheme, None, torch.bfloat16, moment, sweeps=2)

        pair = search.scale, search.zero_point
        error = dequantize(quantize(weight, *pair, scheme), *pair) - weight
        torch.testing.assert_close(search.losses, exact_losses(error, moment), rtol=1e-4, atol=0)
        assert bool((search.losses <= search.plain_losses).all())
        assert search.losses.sum() < 0.9 * search.plain_losses.sum()


def test_rows_that_share_their_scales_have_no_joint_search() -> None:
    """Their loss is no sum over rows of what the search of one row can change."""
    with pytest.raises(ValueError, match="rows that share their scales"):
        search_scales_jointly(
            torch.ones(2, 32), SCHEMES["fp8_block"], None, torch.bfloat16, torch.eye(32), 1
        )
