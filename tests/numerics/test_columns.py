"""The loops over columns against a column at a time in float64, compiled and not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics import columns
from quantkit.numerics.affine import CodeSet, round_values
from quantkit.schemes import SCHEMES

W4, W8, ASYMMETRIC = SCHEMES["w4a16"], SCHEMES["w8a16"], SCHEMES["w4a16_asym"]
INTEGERS = pytest.mark.parametrize("scheme", [W4, W8, ASYMMETRIC], ids=lambda scheme: scheme.name)
ROWS = pytest.mark.parametrize("rows", [7, 128, 300, 700])


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether numba may be used."""
    if request.param == "torch":
        monkeypatch.setattr(columns, "find_spec", lambda name: None)
    return str(request.param)


def make_case(
    size: int, rows: int, scheme: CodeSet, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Weights, targets, unit lower triangle, steps and zero points with exact sums.

    All are multiples of powers of two and small, so that no order of summation rounds.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    block = draw(-64, 65, size, rows) / 16
    target = block + draw(-4, 5, size, rows) / 64
    lower = (draw(-2, 3, size, size) / 8).tril(-1) + torch.eye(size)
    steps = 2.0 ** draw(-2, 1, size, rows)
    offsets = None if scheme.symmetric else draw(-3, 4, size, rows)
    return block, target, lower, steps, offsets


@INTEGERS
@ROWS
def test_columns_are_rounded_from_the_last_to_the_first(
    way: str, rows: int, scheme: CodeSet
) -> None:
    """Each to the code nearest to its weight plus what makes up for those before it."""
    block, target, lower, steps, offsets = make_case(20, rows, scheme)
    expected, left = target.double().clone(), torch.zeros(20, rows, dtype=torch.float64)
    for column in range(19, -1, -1):
        value = expected[column] + lower[column + 1 :, column].double() @ left[column + 1 :]
        offset = None if offsets is None else offsets[column].double()
        expected[column] = round_values(value / steps[column].double(), scheme, offset)
        left[column] = block[column].double() - expected[column] * steps[column].double()
    errors = torch.empty_like(block)

    columns.round_columns(block, target, lower, steps, offsets, scheme, errors)

    assert torch.equal(target.double(), expected)
    assert torch.equal(errors.double(), left)


@INTEGERS
@ROWS
@pytest.mark.parametrize("shared", [1, 5, 20])
def test_descent_moves_one_column_after_the_other(
    way: str, rows: int, shared: int, scheme: CodeSet
) -> None:
    """Each to its best value, and the residual follows; so many columns share their steps."""
    size = 20
    block, _, _, given, zeros = make_case(size, rows, scheme, seed=1)
    given, zeros = given[::shared], None if zeros is None else zeros[::shared]
    steps = given.repeat_interleave(shared, 0)
    offsets = None if zeros is None else zeros.repeat_interleave(shared, 0)
    generator = torch.Generator().manual_seed(2)
    root = torch.randint(-1, 2, (size, size), generator=generator).float()
    # Diagonals that are powers of two divide without rounding.
    inner = root @ root.T
    inner.diagonal().fill_(16.0)
    inner[3], inner[:, 3] = 0.0, 0.0
    values = round_values(block / steps, scheme, offsets)
    residual = inner @ (block - values * steps)
    expected, rest = values.double().clone(), residual.double().clone()
    for column in range(size):
        if column == 3:
            continue
        best = expected[column] + rest[column] / (16.0 * steps[column].double())
        offset = None if offsets is None else offsets[column].double()
        new = round_values(best, scheme, offset)
        change = (expected[column] - new) * steps[column].double()
        rest += inner[column].double().unsqueeze(1) * change
        expected[column] = new

    columns.descend_columns(values, given, zeros, residual, inner, scheme)

    assert torch.equal(values.double(), expected)
    assert torch.equal(residual.double(), rest)


def test_both_ways_agree_on_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a few that lie between two codes but for the rounding of sums."""
    torch.manual_seed(0)
    size, rows = 128, 515
    block = torch.randn(size, rows)
    lower = (torch.randn(size, size) * 0.05).tril(-1) + torch.eye(size)
    steps = torch.rand(size, rows) * 0.1 + 0.2
    found = []
    for names in (True, False):
        if not names:
            monkeypatch.setattr(columns, "find_spec", lambda name: None)
        target, errors = block + 0.01, torch.empty_like(block)
        columns.round_columns(block, target, lower, steps, None, W4, errors)
        found.append(target)
    assert float((found[0] == found[1]).float().mean()) > 0.999


@pytest.mark.parametrize("size", [3, 8, 19, 128])
def test_columns_are_rounded_the_same_however_many_are_taken_together(size: int) -> None:
    """To the last bit what one step after the other gives, each product added without rounding."""
    torch.manual_seed(1)
    block, steps = torch.randn(size, 130), torch.rand(size, 130) * 0.1 + 0.2
    lower = (torch.randn(size, size) * 0.05).tril(-1) + torch.eye(size)
    target, errors = block + 0.01, torch.empty_like(block)
    expected, left = target.double(), torch.empty_like(errors)
    for column in range(size - 1, -1, -1):
        value = expected[column].float() / steps[column]
        expected[column] = round_values(value, W4, None).double()
        product = expected[column] * steps[column].double()
        left[column] = (block[column].double() - product).float()
        for other in range(column):
            more = lower[column, other].double() * left[column].double()
            expected[other] = (expected[other] + more).float().double()

    columns.round_columns(block, target, lower, steps, None, W4, errors)

    assert torch.equal(target.double(), expected)
    assert torch.equal(errors, left)


def test_values_that_are_no_numbers_stay_so(way: str) -> None:
    """A NaN must not become a code that looks sound."""
    block, target, lower, steps, _ = make_case(4, 200, W4)
    target[3, 5] = torch.nan
    errors = torch.empty_like(block)
    columns.round_columns(block, target, lower, steps, None, W4, errors)
    assert bool(errors[3, 5].isnan())


def test_floating_point_codes_are_rounded_too() -> None:
    """They have no even grid, and no compiled loop."""
    torch.manual_seed(0)
    block = torch.randn(8, 200)
    target, errors = block.clone(), torch.empty_like(block)
    steps = torch.full_like(block, 0.01)
    columns.round_columns(block, target, torch.eye(8), steps, None, SCHEMES["fp8_static"], errors)
    nearest = (block / 0.01).to(torch.float8_e4m3fn).float()
    assert torch.equal(target, nearest)


def test_who_lacks_numba_is_told() -> None:
    """It is installed where the tests run."""
    assert columns.missing_compiler() is None
