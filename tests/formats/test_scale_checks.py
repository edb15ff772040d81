"""Wrong scales and zero points beside the errors of sound roundings."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats.comparison import ComparedLayer, explain_layer, find_lonely_layers
from quantkit.formats.scale_checks import LARGEST_BIAS, measure_bias

GROUP = 64


@pytest.fixture
def weight() -> torch.Tensor:
    """Rows and columns of different size, as in a trained layer."""
    draw = torch.Generator().manual_seed(0)
    rows, columns = (0.3 * torch.randn(size, generator=draw) for size in (96, 256))
    return torch.randn(96, 256, generator=draw) * rows.exp().unsqueeze(1) * columns.exp()


def encode(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [R, G, 64] and scales [R, G, 1] of plain rounding."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scales = groups.abs().amax(2, keepdim=True) / largest
    return (groups / scales).round(), scales


def compare(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor) -> ComparedLayer:
    return explain_layer("a.0.b", (codes * scales).reshape(weight.shape), weight, {})


@pytest.mark.parametrize("largest", [2, 7, 127])
def test_a_rounding_has_no_problem_and_little_spread(weight: torch.Tensor, largest: int) -> None:
    """Of 2, 4 and 8 bits; with groups that were clipped a little, too."""
    codes, scales = encode(weight, largest)
    layer = compare(codes, scales, weight)

    assert layer.find_problem(4, 0.5) is None
    assert layer.spread.found < 2 * layer.spread.usual
    assert layer.bias < LARGEST_BIAS / 5
    clipped = 0.9 * scales
    codes = (weight.reshape(codes.shape) / clipped).round().clamp(-largest, largest)
    assert compare(codes, clipped, weight).find_problem(4, 0.5) is None


@pytest.mark.parametrize("times", [5, 10, 24, 30])
@pytest.mark.parametrize("largest", [3, 7, 127])
def test_columns_of_outliers_are_no_wrong_scales(
    weight: torch.Tensor, largest: int, times: int
) -> None:
    """They leave the other weights of a row few codes, and large errors, or are alone in a piece,
    whose factor is then their own rounding."""
    weight[:, ::40] *= times
    scales = weight.abs().amax(1, keepdim=True) / largest
    layer = explain_layer("a.0.b", (weight / scales).round() * scales, weight, {})

    assert layer.find_problem(4, 0.5) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda scales: scales.roll(1, 1),
        lambda scales: scales.squeeze(2).T.reshape(scales.shape),
        lambda scales: scales.flatten().roll(1).reshape(scales.shape),
    ],
)
@pytest.mark.parametrize("largest", [7, 127])
def test_scales_in_another_order_are_told_from_a_coarse_rounding(
    weight: torch.Tensor, largest: int, change: object
) -> None:
    codes, scales = encode(weight, largest)
    problem = compare(codes, change(scales), weight).find_problem(4, 0.5)  # type: ignore[operator]

    assert problem is not None
    assert "layer a.0.b has scales that are not those of its codes" in problem


def test_errors_of_one_sign_are_told(weight: torch.Tensor) -> None:
    """A zero point that is off by one, and codes that were cut off instead of rounded."""
    codes, scales = encode(weight, 7)
    cut = torch.floor(weight.reshape(codes.shape) / scales)

    for wrong in (codes + 1, cut):
        problem = compare(wrong, scales, weight).find_problem(4, 0.5)
        assert problem is not None
        assert "is off to one side" in problem
    assert measure_bias(weight, weight) == 0


def test_scaled_rows_need_a_layer_that_takes_them_back(weight: torch.Tensor) -> None:
    """As a fold between two layers does; heads of values may be there several times."""
    factors = (0.3 * torch.randn(96, generator=torch.Generator().manual_seed(3))).exp()
    heads = factors.reshape(-1, 32).repeat_interleave(2, 0).flatten()
    other = torch.randn(64, 192, generator=torch.Generator().manual_seed(4))

    def name(layer: ComparedLayer, called: str) -> ComparedLayer:
        return ComparedLayer(called, layer.relative_error, layer.folded, fitted=layer.fitted)

    def fit(wanted: torch.Tensor, base: torch.Tensor, called: str) -> ComparedLayer:
        codes, scales = encode(wanted, 127)
        return name(compare(codes, scales, base), called)

    producer = fit(weight * factors.unsqueeze(1), weight, "a.0.v")
    consumer = fit(other / heads, other, "a.0.o")
    elsewhere = fit(other / heads, other, "a.1.o")

    assert not list(find_lonely_layers([producer, consumer], []))
    (problem,) = find_lonely_layers([producer, elsewhere], [])
    assert "the rows of layer a.0.v have other scales than the base's" in problem
    assert not list(find_lonely_layers([producer], ["a.0.o.weight"]))
