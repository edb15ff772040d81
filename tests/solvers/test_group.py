"""Groups of layers that share an input, and how results are measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.errors import CalibrationError
from quantkit.numerics.affine import choose_absmax, dequantize_layer, quantize
from quantkit.records import LayerStats
from quantkit.schemes import EFFORTS, SCHEMES
from quantkit.solvers import measure_weights, output_energy, solve_group
from quantkit.solvers.rounding import alike
from tests.solvers.cases import exact_losses, make_moment, make_plan, make_weight


def test_plain_rounding_needs_no_statistics() -> None:
    """Absmax scales and nearest codes."""
    weight = make_weight(8, 64, seed=0)

    (solution,) = solve_group([weight], None, [make_plan("a", weight, "rtn")], torch.bfloat16)

    scale, zero_point = choose_absmax(weight, SCHEMES["w4a16"], 32, torch.bfloat16)
    assert torch.equal(solution.layer.scale, scale)
    assert torch.equal(solution.layer.codes, quantize(weight, scale, zero_point, SCHEMES["w4a16"]))
    assert solution.layer.name == "a"
    assert solution.damping is None
    assert solution.fallback is None


def test_layers_solved_together_are_the_layers_solved_alone() -> None:
    """q, k and v as one matrix, each with its own name and rows."""
    weights = [make_weight(rows, 64, seed=rows) for rows in (16, 8, 4)]
    plans = [make_plan(name, weight) for name, weight in zip("qkv", weights, strict=True)]
    stats = LayerStats(make_moment(64, seed=1), 5000)

    together = solve_group(weights, stats, plans, torch.bfloat16)
    alone = [
        solve_group([weight], stats, [plan], torch.bfloat16)[0]
        for weight, plan in zip(weights, plans, strict=True)
    ]

    for joint, single in zip(together, alone, strict=True):
        assert joint.layer.name == single.layer.name
        assert torch.equal(joint.layer.codes, single.layer.codes)
        assert torch.equal(joint.layer.scale, single.layer.scale)


def test_layers_of_a_group_can_have_different_settings() -> None:
    """The answers come in the order of the plans."""
    weights = [make_weight(8, 64, seed=seed) for seed in range(4)]
    plans = [
        make_plan("a", weights[0], "gptq", "w4a16", 32),
        make_plan("b", weights[1], "rtn", "w8a16", 64),
        make_plan("c", weights[2], "gptq", "w4a16", 32),
        make_plan("d", weights[3], "awq", "w4a16_asym", None),
    ]
    stats = LayerStats(make_moment(64, 2), 5000)

    solutions = solve_group(weights, stats, plans, torch.float16)

    assert [solution.layer.name for solution in solutions] == ["a", "b", "c", "d"]
    assert [solution.layer.scale.shape[1] for solution in solutions] == [2, 1, 2, 1]
    assert [solution.layer.zero_point is None for solution in solutions] == [1, 1, 1, 0]
    assert [solution.damping for solution in solutions] == [0.01, None, 0.01, None]
    assert all(solution.layer.scale.dtype == torch.float16 for solution in solutions)
    for weight, solution in zip(weights, solutions, strict=True):
        assert solution.layer.codes.shape == weight.shape
        error = dequantize_layer(solution.layer) - weight
        assert output_energy(error, stats) < 0.02 * output_energy(weight, stats)


def test_statistics_and_weights_are_left_as_they_were() -> None:
    """They are the caller's."""
    weight, moment = make_weight(8, 64, seed=3), make_moment(64, seed=3)
    copies = weight.clone(), moment.clone()
    plans = [make_plan("a", weight, method) for method in ("rtn", "awq", "gptq")]

    solve_group([weight] * 3, LayerStats(moment, 5000), plans, torch.bfloat16)

    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_layer_that_no_token_reached_is_rounded_plainly_and_says_so(method: str) -> None:
    """The silent failure of uncalibrated experts."""
    weight = make_weight(8, 32, seed=4)
    stats = LayerStats(torch.zeros(32, 32), 0)

    (solution,) = solve_group([weight], stats, [make_plan("a", weight, method)], torch.bfloat16)

    assert solution.fallback == "rtn: no calibration token reached the layer"


def test_rows_without_output_on_the_calibration_tokens_are_still_rounded() -> None:
    """Inputs that are always zero: every rounding is as good; gptq reports that it gave up."""
    weight = make_weight(8, 32, seed=5)
    stats = LayerStats(torch.zeros(32, 32), 100)

    (solution,) = solve_group([weight], stats, [make_plan("a", weight)], torch.bfloat16)

    assert solution.fallback is not None
    assert measure_weights(weight, dequantize_layer(solution.layer)) < 0.02


def test_statistics_that_are_not_finite_are_an_error_that_names_the_layer() -> None:
    """An overflow in the model must not become an artifact."""
    weight, moment = make_weight(8, 32, seed=6), make_moment(32, seed=6)
    moment[3, 3] = torch.inf

    with pytest.raises(CalibrationError, match=r"input of model\.q_proj is not finite"):
        solve_group(
            [weight], LayerStats(moment, 100), [make_plan("model.q_proj", weight)], torch.bfloat16
        )


def test_a_method_without_its_statistics_is_refused() -> None:
    """A defect of the caller, not of the user."""
    weight = make_weight(8, 32, seed=7)

    with pytest.raises(ValueError, match="method gptq needs statistics"):
        solve_group([weight], None, [make_plan("a", weight)], torch.bfloat16)


def test_a_layer_that_is_not_to_be_quantized_is_refused() -> None:
    """Scheme none has no codes."""
    weight = make_weight(8, 32, seed=7)
    plan = make_plan("a", weight, "rtn", "none", None)

    with pytest.raises(ValueError, match="scheme none has no codes"):
        solve_group([weight], None, [plan], torch.bfloat16)


def test_the_weight_error_is_relative_to_the_weight() -> None:
    """Against float64."""
    weight = make_weight(8, 32, seed=8)
    dequantized = weight + 0.001 * make_weight(8, 32, seed=9)

    found = measure_weights(weight, dequantized)

    expected = (dequantized - weight).double().square().sum() / weight.double().square().sum()
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_losses_of_a_solution_are_those_of_its_codes(method: str) -> None:
    """Against float64: the layer's own and that of plain rounding; the energy is the output's."""
    weights = [make_weight(rows, 96, seed=rows) for rows in (24, 8)]
    plans = [make_plan(name, weight, method) for name, weight in zip("kv", weights, strict=True)]
    stats = LayerStats(make_moment(96, seed=10), 5000)

    solutions = solve_group(weights, stats, plans, torch.bfloat16)

    plain = solve_group(
        weights, None, [make_plan("x", weight, "rtn") for weight in weights], torch.bfloat16
    )
    for weight, solution, rounded in zip(weights, solutions, plain, strict=True):
        for loss, layer in (
            (solution.loss, solution.layer),
            (solution.plain_loss, rounded.layer),
        ):
            error = dequantize_layer(layer) - weight
            expected = float(exact_losses(error, stats.second_moment).sum())
            assert loss == pytest.approx(expected, rel=1e-4)
        energy = float(exact_losses(weight, stats.second_moment).sum())
        assert output_energy(weight, stats) == pytest.approx(energy, rel=1e-4)


def test_measures_of_zero_and_huge_weights_are_finite() -> None:
    """Nothing to nothing is no error, and no square overflows."""
    zero, huge = torch.zeros(4, 32), torch.full((4, 32), 3e38)

    assert measure_weights(zero, zero) == 0.0
    assert measure_weights(huge, huge * 0.5) == pytest.approx(0.25)
    assert measure_weights(huge, huge) == 0.0


def test_layers_in_blocks_are_solved_together_only_where_their_rows_fill_the_blocks() -> None:
    """Each has its own scales, and they are those of the layer solved alone."""
    weights = [make_weight(rows, 160, seed=rows) for rows in (128, 100, 256, 30)]
    plans = [
        make_plan(name, weight, "gptq", "fp8_block", None)
        for name, weight in zip("abcd", weights, strict=True)
    ]
    stats = LayerStats(make_moment(160, seed=1), 9000)

    together = solve_group(weights, stats, plans, torch.bfloat16)

    assert alike(plans) == [[0, 2], [1], [3]]
    for solution, weight, plan in zip(together, weights, plans, strict=True):
        (alone,) = solve_group([weight], stats, [plan], torch.bfloat16)
        assert solution.layer.scale.shape == (-(-len(weight) // 128), 2)
        assert torch.equal(solution.layer.scale, alone.layer.scale)
        assert torch.equal(dequantize_layer(solution.layer), dequantize_layer(alone.layer))


def test_layers_with_another_effort_are_solved_apart() -> None:
    """Polished or not is a setting like any other."""
    weights = [make_weight(8, 64, seed=seed) for seed in range(3)]
    plans = [make_plan(name, weight) for name, weight in zip("abc", weights, strict=True)]
    plans[1] = replace(plans[1], effort=EFFORTS["fast"])
    stats = LayerStats(make_moment(64, seed=1), 9000)

    solutions = solve_group(weights, stats, plans, torch.bfloat16)

    assert alike(plans) == [[0, 2], [1]]
    (polished,) = solve_group([weights[1]], stats, [make_plan("b", weights[1])], torch.bfloat16)
    assert solutions[1].loss is not None
    assert polished.loss is not None
    assert solutions[1].loss > polished.loss
