"""Elimination by pivots, against Schur complements by the inverse and the factor of the order."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.linalg import factor_moment
from quantkit.numerics.pivoting import eliminate_by_pivot, factor_by_pivot
from tests.solvers.cases import DEVICES, make_moment


@pytest.mark.parametrize("device", DEVICES)
def test_each_step_takes_the_eight_smallest_pivots_left(device: str) -> None:
    """Against Schur complements by the inverse, in float64."""
    moment = make_moment(44, seed=1)
    remaining = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(44).double()
    left, expected = list(range(44)), []
    while left:
        ranked = sorted(range(len(left)), key=lambda index: float(remaining[index, index]))
        first, rest = ranked[:8], sorted(ranked[8:])
        expected += [left[index] for index in first]
        cross = remaining[first][:, rest]
        eliminated = cross.T @ torch.linalg.inv(remaining[first][:, first]) @ cross
        remaining = remaining[rest][:, rest] - eliminated
        left = [left[index] for index in rest]

    added = 0.01 * float(moment.diagonal().mean())

    order = eliminate_by_pivot(moment.to(device), added).order

    assert order.tolist() == expected


def test_the_order_by_pivot_levels_the_pivots() -> None:
    """The largest is smaller than in the order of activity; their product is the determinant."""
    moment = make_moment(96, seed=2)
    order = eliminate_by_pivot(moment, 0.01 * float(moment.diagonal().mean())).order
    orders = order, torch.argsort(moment.diagonal())

    factors = [factor_moment(moment, order, 0.01) for order in orders]

    pivots = [factor.lower.diagonal().square() for factor in factors if factor is not None]
    torch.testing.assert_close(pivots[0].log().sum(), pivots[1].log().sum())
    assert pivots[0].max() < pivots[1].max()
    assert pivots[0].sum() < pivots[1].sum()


@pytest.mark.parametrize("kind", ["zero", "indefinite", "vast", "single"])
def test_every_moment_has_an_order_of_all_columns(kind: str) -> None:
    """Also where no elimination is possible; the moment stays as it was."""
    moment = {
        "zero": torch.zeros(40, 40),
        "indefinite": torch.diag(torch.cat([-torch.ones(20), torch.ones(20)])),
        "vast": make_moment(40, seed=3) * 1e12,
        "single": torch.ones(1, 1),
    }[kind]
    before = moment.clone()

    order = eliminate_by_pivot(moment, 0.01 * float(moment.diagonal().mean())).order

    assert order.sort().values.tolist() == list(range(len(moment)))
    assert torch.equal(moment, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "tokens"), [(1, 4), (7, 40), (44, 2000), (320, 40), (700, 9000)])
def test_the_factor_is_that_of_its_order(device: str, size: int, tokens: int) -> None:
    """Against float64, for sizes that drop no columns and several times some; zero above."""
    moment = make_moment(size, seed=4, tokens=tokens).to(device)

    found = factor_by_pivot(moment, 0.0)

    assert found is not None
    assert found.lower.dtype == torch.float32
    assert not found.lower.triu(1).any()
    exact = factor_moment(moment, found.order, 0.0)
    assert exact is not None
    assert exact.damping == found.damping
    pivots = exact.lower.diagonal()
    difference = (found.lower.double() - exact.lower.tril()) / pivots
    assert difference.abs().max() < 2e-3 * (exact.lower.tril() / pivots).abs().max()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_factor_does_not_depend_on_the_unit(scale: float) -> None:
    """Also where squares of the moment's entries would leave the range of float32."""
    moment = make_moment(96, seed=5)

    usual, scaled = (factor_by_pivot(each, 0.01) for each in (moment, moment * scale))

    assert usual is not None
    assert scaled is not None
    assert torch.equal(usual.order, scaled.order)
    torch.testing.assert_close(usual.lower, scaled.lower.float(), rtol=1e-4, atol=1e-4)


def test_more_damping_helps_where_an_elimination_fails() -> None:
    """As `factor_moment` finds it in the order that was begun."""
    moment = torch.diag(torch.cat([torch.ones(60), torch.full((4,), -0.05)]))

    found = factor_by_pivot(moment, 0.0)

    assert found is not None
    assert found.damping == pytest.approx(0.1)


def test_no_damping_mends_a_moment_that_is_far_from_positive() -> None:
    """The caller is told, so nothing falls back in silence."""
    assert factor_by_pivot(torch.zeros(40, 40), 0.01) is None
    assert factor_by_pivot(torch.diag(torch.tensor([8.0, 1.0, -5.0])), 0.01) is None
