"""Solving layers into ggml's block types: against a slow reference, and its guarantees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.codec import decode, encode, pack
from quantkit.numerics.linalg import Factor
from quantkit.records import LayerStats
from quantkit.schemes import EFFORTS
from quantkit.solvers.ggml import GgmlSolution, round_codes, solve_ggml, solve_ggml_group
from quantkit.solvers.ggml_scales import search_blocks
from quantkit.solvers.gptq import factor_by_pivot
from tests.solvers.cases import (
    DEVICES,
    NORMAL,
    exact_losses,
    hard_stats,
    hard_weights,
    make_moment,
    make_weight,
)
from tests.solvers.test_ggml_scales import QUANTIZED, make_grid

BEST = EFFORTS["best"]
CHEAP_BEST = replace(BEST, beam_width=4)


def losses_of(weight: Tensor, blocks: GgmlBlocks, moment: Tensor) -> Tensor:
    """e H e^T of each row, float64."""
    return exact_losses(weight.double() - blocks.dequantize().double(), moment)


def fisher_loss(weight: Tensor, blocks: GgmlBlocks, fisher: Tensor, moment: Tensor) -> float:
    """tr(F E H E^T) in float64, F with the damping of the solver."""
    error = weight.double() - blocks.dequantize().double()
    damped = fisher.double() + 0.3 * fisher.double().diagonal().mean() * torch.eye(len(fisher))
    return float((damped @ error @ moment.double() * error).sum())


def round_slowly(weight: Tensor, blocks: GgmlBlocks, factor: Factor) -> Tensor:
    """Nearest-plane rounding, one weight at a time in float64: the dequantized weights."""
    kind, width = blocks.type, blocks.type.sub_block
    table = [float(value) for value in kind.values or range(kind.codes[0], kind.codes[1] + 1)]
    values = torch.tensor(table, dtype=torch.float64)
    scales = blocks.scales().double().repeat_interleave(width, 1)
    minimums = torch.zeros_like(scales)
    found = blocks.minimums()
    if found is not None:
        minimums = found.double().repeat_interleave(width, 1)
    lower, order = factor.lower, factor.order.tolist()
    result = torch.empty_like(scales)
    for row in range(len(weight)):
        errors = torch.zeros(len(order), dtype=torch.float64)
        for place in range(len(order) - 1, -1, -1):
            column = order[place]
            made_up = (lower[place + 1 :, place] * errors[place + 1 :]).sum() / lower[place, place]
            aim = weight[row, column].double() + made_up
            choices = values * scales[row, column] + minimums[row, column]
            result[row, column] = choices[(choices - aim).abs().argmin()]
            errors[place] = weight[row, column].double() - result[row, column]
    return result


@pytest.mark.parametrize("name", QUANTIZED)
def test_rounding_is_that_of_the_slow_reference(name: str) -> None:
    """Up to the few codes on which float32 and float64 decide differently."""
    kind = GGML_TYPES[name]
    weight, moment = make_weight(2, 256, 0), make_moment(256, 1)
    factor = factor_by_pivot(LayerStats(moment, 2048))
    assert factor is not None
    blocks = search_blocks(weight, kind, torch.ones(256))

    mine = round_codes(weight, blocks, factor, width=1)

    slow = round_slowly(weight, blocks, factor)
    apart = (mine.dequantize() - slow).abs() > 1e-6
    assert int(apart.sum()) <= 0.02 * slow.numel()
    reference = exact_losses(weight.double() - slow, moment)
    torch.testing.assert_close(losses_of(weight, mine, moment), reference, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_on_a_grid_come_back(name: str) -> None:
    """The loss vanishes beside that of llama.cpp's rounding of such weights moved off it."""
    kind = GGML_TYPES[name]
    weight, stats = make_grid(kind, 4, 256, 1).dequantize(), LayerStats(make_moment(256, 0), 2048)
    away = weight + 0.3 * make_grid(kind, 4, 256, 1).scales().abs().amin()

    found = solve_ggml(weight, kind, stats, NORMAL)

    assert found.loss is not None
    assert found.loss <= 1e-5 * float(losses_of(away, found.blocks, stats.second_moment).sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_loss_is_less_than_half_of_llamacpps(name: str, device: str) -> None:
    """On correlated inputs; the losses that are told are the true ones."""
    kind, weight = GGML_TYPES[name], make_weight(32, 256, 3)
    stats = LayerStats(make_moment(256, 4), 2048)
    on_device = LayerStats(stats.second_moment.to(device), stats.tokens)

    found = solve_ggml(weight.to(device), kind, on_device, NORMAL)

    assert found.blocks.codes.device.type == device
    plain = encode(kind, weight, stats.second_moment.diagonal().contiguous())
    expected = float(losses_of(weight, plain, stats.second_moment).sum())
    assert found.plain_loss == pytest.approx(expected, rel=1e-3)
    true = exact_losses(
        weight.double() - found.blocks.dequantize().cpu().double(), stats.second_moment
    )
    assert found.loss == pytest.approx(float(true.sum()), rel=1e-3)
    assert found.loss < 0.5 * expected
    assert found.fallback is None


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q4_1", "IQ4_XS"])
def test_more_effort_lowers_the_loss(name: str) -> None:
    """fast, normal, best."""
    kind, weight = GGML_TYPES[name], make_weight(24, 256, 5)
    stats = LayerStats(make_moment(256, 6), 2048)

    solutions = [solve_ggml(weight, kind, stats, EFFORTS[name]) for name in ("fast", "normal")]
    solutions.append(solve_ggml(weight, kind, stats, CHEAP_BEST))

    losses = [solution.loss or torch.inf for solution in solutions]
    assert losses[0] == solutions[0].plain_loss
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q2_K", "Q4_0", "Q5_1", "IQ4_NL", "IQ4_XS"])
def test_rows_that_make_up_for_each_other_do_better_on_the_models_objective(name: str) -> None:
    """Than the same effort without the Fisher matrix."""
    kind, weight = GGML_TYPES[name], make_weight(40, 256, 7)
    fisher, stats = make_moment(40, 8), LayerStats(make_moment(256, 9), 2048)

    alone = solve_ggml(weight, kind, stats, CHEAP_BEST)
    found = solve_ggml(weight, kind, stats, CHEAP_BEST, fisher)

    mine = fisher_loss(weight, found.blocks, fisher, stats.second_moment)
    assert mine < 0.95 * fisher_loss(weight, alone.blocks, fisher, stats.second_moment)
    assert found.fallback is None


def assert_sound(weight: Tensor, kind: GgmlType, found: GgmlSolution) -> None:
    """It packs, so that all is in range, decodes to what it says, and is finite."""
    decoded = decode(kind, pack(found.blocks))
    assert torch.equal(decoded, found.blocks.dequantize())
    assert decoded.shape == weight.shape
    assert bool(decoded.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(QUANTIZED),
    weight=hard_weights(6, 256),
    stats=hard_stats(256),
    effort=st.sampled_from([NORMAL, CHEAP_BEST]),
)
def test_no_row_is_worse_than_llamacpps(
    name: str, weight: Tensor, stats: LayerStats, effort: object
) -> None:
    """Whatever weights and inputs are like; weights beyond float16 are refused."""
    kind = GGML_TYPES[name]
    importance = stats.second_moment.diagonal().contiguous()
    try:
        plain = encode(kind, weight, importance if bool(importance.amax() > 0) else None)
    except ValueError:
        with pytest.raises(ValueError, match="float16"):
            solve_ggml(weight, kind, stats, NORMAL)
        assume(False)

    found = solve_ggml(weight, kind, stats, CHEAP_BEST if effort is CHEAP_BEST else NORMAL)

    assert_sound(weight, kind, found)
    largest = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-45)
    errors = [(each.dequantize().double() - weight) / largest for each in (plain, found.blocks)]
    old, new = (exact_losses(error, stats.second_moment) for error in errors)
    resolution = 1e-5 * errors[0].square().sum(1) * stats.second_moment.diagonal().sum()
    assert bool((new <= old + resolution).all())


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(QUANTIZED),
    weight=hard_weights(6, 256),
    stats=hard_stats(256),
    kind_of_fisher=st.sampled_from(["plain", "few", "zero", "tiny", "one"]),
)
def test_no_panel_is_worse_than_llamacpps_on_the_models_objective(
    name: str, weight: Tensor, stats: LayerStats, kind_of_fisher: str
) -> None:
    """Whatever the Fisher matrix is like."""
    kind, fisher = GGML_TYPES[name], make_moment(6, 3, 2 if kind_of_fisher == "few" else None)
    fisher *= {"zero": 0.0, "tiny": 1e-20}.get(kind_of_fisher, 1.0)
    if kind_of_fisher == "one":
        fisher[1:], fisher[:, 1:] = 0.0, 0.0
    weight = weight.clamp(-1e3, 1e3)

    found = solve_ggml(weight, kind, stats, CHEAP_BEST, fisher)

    assert_sound(weight, kind, found)
    importance = stats.second_moment.diagonal().contiguous()
    plain = encode(kind, weight, importance if bool(importance.amax() > 0) else None)
    unit = weight.double().abs().amax().clamp(min=1e-45)
    damped = fisher.double() if bool(fisher.any()) else torch.eye(6, dtype=torch.float64)
    damped += 0.3 * damped.diagonal().mean() * torch.eye(6) * bool(fisher.any())
    old, new, size = (
        float((damped @ error @ stats.second_moment.double() * error).sum())
        for error in (
            (plain.dequantize() - weight).double() / unit,
            (found.blocks.dequantize() - weight).double() / unit,
            weight.double() / unit,
        )
    )
    assert new <= old * (1 + 1e-4) + 1e-9 * abs(size)


@pytest.mark.parametrize("fisher", [None, make_moment(16, 2)], ids=["alone", "coupled"])
def test_the_result_is_the_same_on_every_run(fisher: Tensor | None) -> None:
    """Bit by bit."""
    weight, stats = make_weight(16, 256, 0), LayerStats(make_moment(256, 1), 2048)

    one, other = (
        solve_ggml(weight, GGML_TYPES["Q3_K"], stats, CHEAP_BEST, fisher) for _ in range(2)
    )

    assert torch.equal(pack(one.blocks), pack(other.blocks))
    assert one.loss == other.loss


def test_layers_of_a_group_are_solved_as_on_their_own() -> None:
    """Each in its own type."""
    weights = [make_weight(8, 256, 0), make_weight(12, 256, 1)]
    kinds = [GGML_TYPES["Q4_K"], GGML_TYPES["Q6_K"]]
    stats = LayerStats(make_moment(256, 1), 2048)

    together = solve_ggml_group(weights, kinds, stats, NORMAL, [None, None])

    for weight, kind, found in zip(weights, kinds, together, strict=True):
        assert torch.equal(pack(found.blocks), pack(solve_ggml(weight, kind, stats, NORMAL).blocks))


@pytest.mark.parametrize("name", QUANTIZED)
def test_without_statistics_each_row_has_the_least_squared_error(name: str) -> None:
    """Of a search and of llama.cpp's encoding, which `fast` takes as it is; no loss is known."""
    weight, kind = make_weight(40, 256, 0), GGML_TYPES[name]
    plain = encode(kind, weight, None)

    found = solve_ggml(weight, kind, None, NORMAL)
    fast = solve_ggml(weight, kind, None, EFFORTS["fast"])

    assert torch.equal(pack(fast.blocks), pack(plain))
    old, new = (
        (each.dequantize() - weight).double().square().sum(1) for each in (plain, found.blocks)
    )
    assert bool((new <= old).all())
    assert float(new.sum()) < 0.99 * float(old.sum())
    assert (found.loss, found.plain_loss, found.fallback) == (None, None, None)


def test_fast_is_llamacpps_own_encoding_with_the_importance_matrix() -> None:
    """The diagonal of the second moment."""
    weight, kind, moment = make_weight(4, 256, 0), GGML_TYPES["Q5_K"], make_moment(256, 0)

    found = solve_ggml(weight, kind, LayerStats(moment, 2048), EFFORTS["fast"])

    importance = moment.diagonal().contiguous()
    assert torch.equal(pack(found.blocks), pack(encode(kind, weight, importance)))
    assert found.fallback is None


@pytest.mark.parametrize(
    ("stats", "reason"),
    [
        (LayerStats(torch.zeros(256, 256), 0), "no calibration token reached the layer"),
        (LayerStats(torch.zeros(256, 256), 9), "could not be factorized under any damping"),
    ],
)
def test_inputs_that_say_nothing_are_named(stats: LayerStats, reason: str) -> None:
    """llama.cpp's encoding is what is left."""
    weight, kind = make_weight(4, 256, 0), GGML_TYPES["Q4_0"]

    found = solve_ggml(weight, kind, stats, NORMAL)

    assert found.fallback is not None
    assert reason in found.fallback
    assert torch.equal(pack(found.blocks), pack(encode(kind, weight, None)))


def test_what_cannot_be_encoded_is_refused() -> None:
    """Types without codes, columns that fill no block, scales beyond float16."""
    stats = LayerStats(make_moment(96, 0), 2048)
    with pytest.raises(ValueError, match="F16 has no codes"):
        solve_ggml(make_weight(2, 96, 0), GGML_TYPES["F16"], stats, NORMAL)
    with pytest.raises(ValueError, match="not whole blocks of 256"):
        solve_ggml(make_weight(2, 96, 0), GGML_TYPES["Q4_K"], stats, NORMAL)
    with pytest.raises(ValueError, match="too large for Q4_0"):
        solve_ggml(make_weight(2, 96, 0) * 1e9, GGML_TYPES["Q4_0"], stats, NORMAL)
