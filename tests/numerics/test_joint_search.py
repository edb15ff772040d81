"""Jointly searched scales: the losses of rows against float64, by torch and by compiled loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from quantkit.numerics import joint_search
from quantkit.numerics.affine import choose_absmax, dequantize, quantize
from quantkit.numerics.joint_cheapest import chooses_jointly
from quantkit.numerics.joint_search import JointSearch, search_scales_jointly
from quantkit.numerics.scale_candidates import FINE
from quantkit.records import LayerStats
from quantkit.schemes import SCHEMES, Scheme
from tests.solvers.cases import (
    dtypes,
    error_in_units,
    exact_losses,
    group_sizes,
    hard_stats,
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


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize(("name", "size"), [("w4a16", 128), ("w4a16_asym", 40), ("w8a16", 256)])
def test_loops_and_torch_find_the_same(
    name: str, size: int, channels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single scales may differ where two cost the same but for rounding; no loss does by 1e-3."""
    scheme, rows, columns = SCHEMES[name], 700, 5 * size
    weight, moment = make_weight(rows, columns, seed=11), make_moment(columns, seed=11)
    channel = torch.exp(0.3 * make_weight(rows, columns, seed=12) / 0.03) if channels else None
    assert chooses_jointly(weight, scheme, size)

    def search() -> JointSearch:
        return search_scales_jointly(
            weight, scheme, size, torch.bfloat16, moment, 2, channel_scale=channel
        )

    by_loops = search()
    monkeypatch.setattr(joint_search, "chooses_jointly", lambda *_: False)
    by_torch = search()

    torch.testing.assert_close(by_loops.plain_losses, by_torch.plain_losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_loops.losses.sum(), by_torch.losses.sum(), rtol=1e-4, atol=0)
    assert (by_loops.scale != by_torch.scale).float().mean() < 0.01
    for found in (by_loops, by_torch):
        pair = found.scale, found.zero_point
        scaled = weight if channel is None else weight * channel
        error = dequantize(quantize(scaled, *pair, scheme), *pair) - scaled
        error = error if channel is None else error / channel
        torch.testing.assert_close(found.losses, exact_losses(error, moment), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [1, 700])
def test_a_sweep_takes_the_best_scale_that_is_left_of_each_group(rows: int) -> None:
    """Group after group, every candidate in float64, for the errors that the others have then."""
    scheme, size = SCHEMES["w4a16"], 64
    weight, moment = make_weight(rows, 192, seed=13), make_moment(192, seed=13)

    found = search_scales_jointly(weight, scheme, size, torch.float32, moment, sweeps=1)

    def loss(scale: Tensor) -> Tensor:
        error = dequantize(quantize(weight, scale, None, scheme), scale, None) - weight
        return exact_losses(error, moment)

    absmax, _ = choose_absmax(weight, scheme, size, torch.float32)
    scale = absmax.clone()
    for group in range(3):
        tried = []
        for factor in (1.0, *FINE.low_bits):
            scale[:, group] = absmax[:, group] * factor
            tried.append(loss(scale))
        scale[:, group] = found.scale[:, group]
        least = torch.stack(tried).amin(0)
        assert bool((loss(scale) <= least * (1 + 1e-5)).all())


@pytest.mark.parametrize("size", [48, 1024])
def test_groups_have_to_be_of_equal_size(size: int) -> None:
    """Neither a remainder nor a group wider than the weight."""
    with pytest.raises(ValueError, match="does not divide"):
        search_scales_jointly(
            torch.ones(512, 128), SCHEMES["w4a16"], size, torch.bfloat16, torch.eye(128), 1
        )
