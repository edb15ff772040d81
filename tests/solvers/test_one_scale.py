"""One scale for all rows of layers that share an input."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.affine import decode, quantize
from quantkit.records import LayerStats, LinearPlan
from quantkit.schemes import EFFORTS, METHODS, SCHEMES
from quantkit.solvers import solve_group
from quantkit.solvers.one_scale import round_under_one_scale

SCHEME = SCHEMES["fp8_static"]
SIZE = 48


def make_stats(seed: int = 0) -> LayerStats:
    """Correlated inputs, more of them than channels."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, SIZE, generator=draw) @ torch.randn(SIZE, SIZE, generator=draw)
    return LayerStats(inputs.T @ inputs / len(inputs), len(inputs))


def make_weight(rows: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Rows of unlike magnitude."""
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, SIZE, generator=draw) * torch.rand(rows, 1, generator=draw)


def plan(name: str, rows: int, method: str) -> LinearPlan:
    """A layer of which all rows have one scale."""
    return LinearPlan(name, rows, SIZE, False, SCHEME, None, METHODS[method], one_scale=True)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_with_one_input_share_one_scale(method: str) -> None:
    """Whichever method rounds them; so that no server rounds them again."""
    weights = [make_weight(24, 1), make_weight(8, 2, scale=0.1)]
    linears = [plan("q", 24, method), plan("k", 8, method)]
    solved = solve_group(weights, make_stats(), linears, torch.bfloat16)
    scales = {float(each) for solution in solved for each in solution.layer.scale.flatten()}
    assert len(scales) == 1
    assert solved[0].layer.scale.shape == (24, 1)
    for weight, solution in zip(weights, solved, strict=True):
        found = decode(solution.layer.codes, solution.layer.scale, None, SCHEME)
        assert float((found - weight).norm() / weight.norm()) < 0.06


def test_plain_rounding_takes_the_scale_of_the_largest_weight() -> None:
    weight = make_weight(16, 3)
    found = round_under_one_scale(
        weight, SCHEME, "rtn", torch.float32, make_stats(), EFFORTS["normal"]
    )
    assert float(found.scale[0, 0]) == pytest.approx(float(weight.abs().max()) / 448)
    assert torch.equal(
        found.codes.view(torch.int8), quantize(weight, found.scale, None, SCHEME).view(torch.int8)
    )


def test_compensation_lowers_the_output_error() -> None:
    """Below plain rounding under the same scale, and no row is worse."""
    weight, stats = make_weight(32, 4), make_stats(4)
    found = round_under_one_scale(weight, SCHEME, "gptq", torch.bfloat16, stats, EFFORTS["normal"])
    assert found.losses is not None
    assert found.plain_losses is not None
    assert bool((found.losses <= found.plain_losses).all())
    assert float(found.losses.sum()) < 0.8 * float(found.plain_losses.sum())
    assert bool((found.scale == found.scale[0]).all())
    # Nothing is clipped: no weight is beyond the largest code, but for the rounding of the scale.
    assert float(weight.abs().max()) <= 448 * float(found.scale[0, 0]) * (1 + 2**-8)


def test_a_layer_of_zeros_and_one_without_tokens_get_plain_rounding() -> None:
    zeros = torch.zeros(4, SIZE)
    found = round_under_one_scale(
        zeros, SCHEME, "gptq", torch.bfloat16, make_stats(), EFFORTS["fast"]
    )
    assert float(found.scale[0, 0]) == 1
    unseen = LayerStats(torch.zeros(SIZE, SIZE), 0)
    found = round_under_one_scale(
        make_weight(4, 5), SCHEME, "gptq", torch.bfloat16, unseen, EFFORTS["fast"]
    )
    assert found.fallback == "rtn: no calibration token reached the layer"
