"""Scales of ggml's block types: exact grids, brute force, llama.cpp's own search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.affine import round_second, round_values
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.codec import unpack
from quantkit.solvers.ggml_halves import Quadratic, refit_halves, to_half
from quantkit.solvers.ggml_scales import search_blocks
from tests.ggml_oracle import encode_with_ggml
from tests.solvers.cases import DEVICES, make_weight

QUANTIZED = [name for name, kind in GGML_TYPES.items() if kind.quantized]


def make_grid(kind: GgmlType, rows: int, columns: int, seed: int) -> GgmlBlocks:
    """Random blocks that use the whole range of their codes and integers."""
    generator = torch.Generator().manual_seed(seed)
    subs, blocks = columns // kind.sub_block, columns // kind.block

    def integers(bounds: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
        return torch.randint(bounds[0], bounds[1] + 1, shape, generator=generator).to(torch.int8)

    codes = integers(kind.codes, (rows, subs, kind.sub_block))
    codes[:, :, 0], codes[:, :, 1] = kind.codes
    d = (0.01 + 0.01 * torch.rand(rows, blocks, generator=generator)).half()
    m = sub_scales = sub_minimums = None
    if kind.sub_scales is not None:
        low, high = kind.sub_scales
        sub_scales = integers((high // 2, high), (rows, subs))
        # The largest of each super-block is the largest there is.
        sub_scales.unflatten(1, (blocks, -1))[:, :, 0] = low or high
    if kind.has_minimum:
        m = d * 2
        if kind.sub_minimums is not None:
            sub_minimums = integers((1, kind.sub_minimums[1]), (rows, subs))
            sub_minimums.unflatten(1, (blocks, -1))[:, :, 1] = kind.sub_minimums[1]
        else:
            m = -m
    return GgmlBlocks(kind, codes.flatten(1), d, m, sub_scales, sub_minimums)


def total(weight: Tensor, blocks: GgmlBlocks, importance: Tensor) -> float:
    """sum v e^2 in float64."""
    error = weight.double() - blocks.dequantize().double()
    return float((error.square() * importance.double()).sum())


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_on_a_grid_come_back(name: str) -> None:
    """All but the rounding of float32 where a scale is a product."""
    kind = GGML_TYPES[name]
    grid = make_grid(kind, 6, 512, 3)
    weight = grid.dequantize()

    found = search_blocks(weight, kind, torch.ones(512))

    error = (found.dequantize() - weight).abs().amax()
    step = grid.scales().abs().amax()
    assert float(error) < 1e-3 * float(step)


@pytest.mark.parametrize("name", QUANTIZED)
def test_search_does_better_than_llamacpp_on_its_objective(name: str) -> None:
    """In sum, on weights and importances of trained layers."""
    kind, weight = GGML_TYPES[name], make_weight(48, 512, 1)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)).square() + 0.05
    theirs = unpack(kind, encode_with_ggml(kind, weight, importance))

    mine = search_blocks(weight, kind, importance / importance.mean())

    assert total(weight, mine, importance) < total(weight, theirs, importance)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "IQ4_NL"])
def test_scale_is_near_the_best_of_all(name: str) -> None:
    """Every scale in reach is tried: at most 3 % is lost on the sum of 40 blocks."""
    kind, weight = GGML_TYPES[name], make_weight(40, 32, 2)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.1
    values = torch.tensor([float(value) for value in kind.values or range(-16, 16)])
    values = values[(values >= kind.codes[0]) & (values <= kind.codes[1]) | bool(kind.values)]
    largest = weight.abs().amax(1, keepdim=True)
    best = torch.full((40,), torch.inf)
    for fraction in torch.linspace(-1.5, 1.5, 1001):
        scale = largest / values.abs().max() * (fraction if fraction else 1.0)
        nearest = (weight.unsqueeze(2) - scale.unsqueeze(2) * values).abs().amin(2)
        best = torch.minimum(best, (nearest.square() * importance).sum(1))

    found = search_blocks(weight, kind, importance)

    assert total(weight, found, importance) < 1.03 * float(best.sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_search_is_the_same_on_every_run(name: str, device: str) -> None:
    """Bit by bit."""
    kind, weight = GGML_TYPES[name], make_weight(8, 256, 5).to(device)
    importance = torch.ones(256, device=device)

    one, other = (search_blocks(weight, kind, importance) for _ in range(2))

    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.d, other.d)


def test_halves_take_the_best_change_that_float16_can_hold() -> None:
    """The minimum of the quadratic, up to the rounding of both."""
    d, m = torch.tensor([1.0]).half(), torch.tensor([-2.0]).half()
    bend, cross, bend_m = torch.tensor([4.0]), torch.tensor([1.0]), torch.tensor([3.0])
    best = torch.tensor([0.25, -0.5])
    slopes = torch.tensor([[4.0, 1.0], [1.0, 3.0]]) @ best
    quadratic = Quadratic(slopes[:1], bend, slopes[1:], cross, bend_m)

    new_d, new_m = refit_halves(d, m, quadratic, torch.ones(1))

    assert new_m is not None
    assert new_d.item() == 1.25
    assert new_m.item() == -2.5


def test_halves_stay_where_nothing_is_better() -> None:
    """At the best place, and where the change is lost in rounding."""
    d = torch.tensor([1.0, 1.0]).half()
    slope, none = torch.tensor([0.0, 1e-6]), torch.zeros(2)

    new_d, new_m = refit_halves(
        d, None, Quadratic(slope, torch.ones(2), none, none, none), torch.ones(2)
    )

    assert torch.equal(new_d, d)
    assert new_m is None


def test_halves_are_finite() -> None:
    """The largest float16 stands for what is larger, and 0 for what is no number."""
    found = to_half(torch.tensor([1e9, -torch.inf, torch.nan]))

    assert found.tolist() == [65504.0, -65504.0, 0.0]


@pytest.mark.parametrize("name", QUANTIZED)
def test_values_are_rounded_to_the_nearest_and_second_nearest_code(name: str) -> None:
    """As a search through all of them finds; there is no second beyond the last."""
    kind = GGML_TYPES[name]
    table = torch.tensor([float(v) for v in kind.values or range(kind.codes[0], kind.codes[1] + 1)])
    exact = torch.linspace(1.3 * float(table[0]) - 1, 1.3 * float(table[-1]), 997)

    nearest = round_values(exact.clone(), kind, None)
    second = round_second(exact, nearest, kind, None)

    order = (exact.unsqueeze(1) - table).abs().argsort(dim=1, stable=True)
    assert torch.equal(nearest, table[order[:, 0]])
    inside = (exact > table[0]) & (exact < table[-1]) & (exact != nearest)
    on_the_way = torch.where(exact > nearest, 1, -1) + torch.searchsorted(table, nearest)
    assert torch.equal(second[inside], table[on_the_way[inside]])
    assert torch.equal(second[exact > table[-1]], nearest[exact > table[-1]])
    assert torch.equal(second[exact < table[0]], nearest[exact < table[0]])
