"""The cheapest scales against a loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics import cheapest
from quantkit.numerics.affine import code_range
from quantkit.numerics.cheapest import cheapest_scales, chooses_cheapest
from quantkit.numerics.scale_search import search_scales
from quantkit.schemes import SCHEMES, Scheme

W4, W8, ASYMMETRIC = SCHEMES["w4a16"], SCHEMES["w8a16"], SCHEMES["w4a16_asym"]
INTEGERS = pytest.mark.parametrize("scheme", [W4, W8, ASYMMETRIC], ids=lambda scheme: scheme.name)


def make_case(
    rows: int, groups: int, size: int, scheme: Scheme, per_row: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Weights, units, scales, zero points and importances with exact costs, some of them equal.

    All are small multiples of powers of two, so that no order of summation rounds.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    grouped = draw(-32, 33, rows, groups, size) / 8
    unit = 2.0 ** draw(-2, 3, rows, groups)
    steps = draw(1, 9, 6, rows, groups) / 8
    # Each comes twice.
    scales = (torch.cat([steps, steps]) * unit).bfloat16()
    zero_points = draw(-8, 8, 12, rows, groups).to(torch.int8)
    importance = draw(0, 4, rows if per_row else 1, groups, size)
    return grouped, unit, scales, None if scheme.symmetric else zero_points, importance


def choose_slowly(
    grouped: Tensor,
    unit: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    importance: Tensor,
    scheme: Scheme,
) -> Tensor:
    """Candidate after candidate in float64; the first of equals."""
    smallest, largest = code_range(scheme.weight_bits)
    best = torch.zeros(grouped.shape[:2], dtype=torch.int64)
    least = torch.full(grouped.shape[:2], torch.inf, dtype=torch.float64)
    for number, scale in enumerate(scales.double()):
        step = (scale / unit).unsqueeze(2)
        shift = 0.0 if zero_points is None else zero_points[number].double().unsqueeze(2)
        codes = ((grouped.double() / step).round() + shift).clamp(smallest, largest)
        cost = (((codes - shift) * step - grouped).square() * importance).sum(2)
        better = cost < least
        best = torch.where(better, number, best)
        least = torch.where(better, cost, least)
    return best


@INTEGERS
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("rows", "groups", "size"), [(1, 1, 32), (37, 3, 32), (5, 2, 128), (9, 1, 300), (7, 2, 5)]
)
def test_the_cheapest_is_found_and_the_first_of_equals(
    rows: int, groups: int, size: int, per_row: bool, scheme: Scheme
) -> None:
    """Groups of any width, importances of columns and of rows."""
    case = make_case(rows, groups, size, scheme, per_row)

    found = cheapest_scales(*case, scheme)

    assert torch.equal(found, choose_slowly(*case, scheme))


def test_threads_share_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into parts of unequal lengths."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(cheapest, "_WEIGHTS_A_THREAD", 1)
    case = make_case(41, 2, 64, ASYMMETRIC, per_row=True)
    assert torch.equal(cheapest_scales(*case, ASYMMETRIC), choose_slowly(*case, ASYMMETRIC))


def test_costs_that_are_no_numbers_never_win() -> None:
    """Where the first is none, it stays, as a comparison with it is never true."""
    grouped, unit, scales, _, importance = make_case(4, 2, 32, W4, per_row=False)
    expected = choose_slowly(grouped, unit, scales, None, importance, W4)
    broken = torch.full_like(scales[:1], torch.nan)
    after = torch.cat([scales[:1], broken, scales])
    found = cheapest_scales(grouped, unit, after, None, importance, W4)
    assert torch.equal(found, torch.where(expected == 0, 0, expected + 2))
    before = torch.cat([broken, scales])
    assert not cheapest_scales(grouped, unit, before, None, importance, W4).any()


def test_steps_too_small_to_divide_by_clip() -> None:
    """Scales of nothing beside their unit: every code is at a limit, and the larger scale wins."""
    grouped = torch.full((3, 1, 32), 2.0)
    scales = torch.tensor([0.0, 1e-38, 0.125]).view(3, 1, 1).expand(3, 3, 1)
    unit, importance = torch.full((3, 1), 4.0), torch.ones(1, 1, 32)
    found = cheapest_scales(grouped, unit, scales, None, importance, W4)
    assert torch.equal(found, torch.full((3, 1), 2))


@INTEGERS
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("per_row", [False, True])
def test_the_search_finds_what_torch_finds(
    per_row: bool, group_size: int | None, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to costs that agree to 1e-6, over a last part with fewer rows than those before."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1370, 384, generator=generator)
    weight[3] = 0.0
    importance = torch.rand((1370, 384) if per_row else (384,), generator=generator) ** 3
    assert chooses_cheapest(weight, scheme)

    found = search_scales(weight, scheme, group_size, torch.bfloat16, importance)
    monkeypatch.setattr(cheapest, "find_spec", lambda name: None)
    expected = search_scales(weight, scheme, group_size, torch.bfloat16, importance)

    shape = (*found[0].shape, -1)
    costs = []
    for scale, zero_point in (found, expected):
        step = scale.double().unsqueeze(2)
        shift = 0.0 if zero_point is None else zero_point.double().unsqueeze(2)
        codes = ((weight.double().reshape(shape) / step).round() + shift).clamp(
            *code_range(scheme.weight_bits)
        )
        error = (codes - shift) * step - weight.reshape(shape)
        costs.append((error.square() * importance.expand_as(weight).reshape(shape)).sum(2))
    torch.testing.assert_close(*costs, rtol=2e-6, atol=0)
    assert float((found[0] == expected[0]).float().mean()) > 0.999


@pytest.mark.parametrize("name", ["fp8_static", "fp8_block"])
def test_floating_point_codes_are_left_to_torch(name: str) -> None:
    """Their grid is not even."""
    assert not chooses_cheapest(torch.ones(1024, 1024), SCHEMES[name])


def test_small_weights_are_left_to_torch() -> None:
    """It is done before numba is imported."""
    assert not chooses_cheapest(torch.ones(64, 64), W4)
