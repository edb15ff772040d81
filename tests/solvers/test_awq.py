"""The choice of a scale per channel."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.affine import dequantize_layer
from quantkit.records import LayerStats
from quantkit.solvers import choose_fold, scale_stats, solve_group
from tests.solvers.cases import DEVICES, exact_losses, make_moment, make_plan, make_weight


def make_uneven_stats(columns: int, seed: int) -> LayerStats:
    """A few channels are much more active than the others, which is what AWQ is for."""
    channels = torch.ones(columns)
    channels[:: columns // 4] = 30.0
    moment = make_moment(columns, seed) * channels * channels.unsqueeze(1)
    return LayerStats(moment, 10_000)


def solved_loss(weight: torch.Tensor, stats: LayerStats, scale: torch.Tensor, method: str) -> float:
    """tr(E H E^T) in the unscaled domain, after folding `scale` and solving."""
    plan = make_plan("layer", weight, method)
    folded = scale_stats(stats, scale)
    (solution,) = solve_group([weight * scale], folded, [plan], torch.bfloat16)
    error = dequantize_layer(solution.layer) / scale - weight
    return float(exact_losses(error, stats.second_moment).sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_the_chosen_scale_lowers_the_error_of_the_solved_layer(method: str, device: str) -> None:
    """Not only on the rows by which it was chosen, but on all."""
    weight = make_weight(96, 128, seed=0).to(device)
    stats = make_uneven_stats(128, seed=0)
    stats = LayerStats(stats.second_moment.to(device), stats.tokens)

    choice = choose_fold([weight], stats, [make_plan("a", weight, method)], torch.bfloat16)

    assert choice.exponent is not None
    assert choice.loss < choice.identity_loss
    identity = torch.ones_like(choice.scale)
    assert solved_loss(weight, stats, choice.scale, method) < solved_loss(
        weight, stats, identity, method
    )


def test_the_scale_is_positive_finite_and_centred() -> None:
    """Divided by sqrt(max * min), so the largest and the smallest are each other's inverse."""
    weight = make_weight(64, 128, seed=1)

    choice = choose_fold(
        [weight], make_uneven_stats(128, 1), [make_plan("a", weight, "awq")], torch.bfloat16
    )

    assert bool(choice.scale.isfinite().all())
    assert float(choice.scale.min() * choice.scale.max()) == pytest.approx(1.0)


def test_dead_channels_do_not_break_the_scale() -> None:
    """A channel without activity or without weights gets a finite scale."""
    weight, stats = make_weight(32, 64, seed=2), make_uneven_stats(64, 2)
    weight[:, 5] = 0.0
    stats.second_moment[7] = 0.0
    stats.second_moment[:, 7] = 0.0

    choice = choose_fold([weight], stats, [make_plan("a", weight, "awq+gptq")], torch.bfloat16)

    assert bool(choice.scale.isfinite().all())
    assert bool((choice.scale > 0).all())


def test_without_statistics_worth_the_name_the_identity_is_chosen() -> None:
    """No tokens, or an input that is always zero."""
    weight = make_weight(8, 32, seed=3)
    plan = make_plan("a", weight, "awq")

    for stats in (
        LayerStats(make_moment(32, 3), 0),
        LayerStats(torch.zeros(32, 32), 100),
    ):
        choice = choose_fold([weight], stats, [plan], torch.bfloat16)

        assert choice.exponent is None
        assert torch.equal(choice.scale, torch.ones(32))


def test_grouped_heads_share_their_scale() -> None:
    """o_proj's input is [kv_head, repeat, head_dim]; the scale is equal along `repeat`."""
    weight, stats = make_weight(48, 96, seed=4), make_uneven_stats(96, 4)
    plan = make_plan("o_proj", weight, "awq")

    choice = choose_fold([weight], stats, [plan], torch.bfloat16, repeat=3, head_dim=16)

    heads = choice.scale.reshape(2, 3, 16)
    assert choice.exponent is not None
    assert torch.equal(heads, heads[:, :1].expand_as(heads))


def test_layers_with_different_settings_and_unquantized_ones_share_a_choice() -> None:
    """Each is judged by its own rounder; what is not quantized has no error to judge."""
    weights = [make_weight(rows, 128, seed=rows) for rows in (32, 16, 8)]
    plans = [
        make_plan("q", weights[0], "awq"),
        make_plan("k", weights[1], "awq+gptq", group_size=128),
        make_plan("v", weights[2], "awq", scheme="none", group_size=None),
    ]
    stats = make_uneven_stats(128, 5)

    choice = choose_fold(weights, stats, plans, torch.bfloat16)
    without = choose_fold(weights[:2], stats, plans[:2], torch.bfloat16)

    assert choice.scale.shape == (128,)
    assert choice.loss == without.loss


def test_the_choice_is_repeatable() -> None:
    """Rows are sampled at fixed places."""
    weight, stats = make_weight(200, 64, seed=6), make_uneven_stats(64, 6)
    plan = make_plan("a", weight, "awq+gptq")

    first, second = (choose_fold([weight], stats, [plan], torch.bfloat16) for _ in range(2))

    assert torch.equal(first.scale, second.scale)
    assert first.loss == second.loss
