"""The factor of a second moment, its damping, and the loss of rows."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.linalg import (
    factor_moment,
    row_losses,
    sampling_ridge,
)
from tests.solvers.cases import DEVICES, exact_losses, make_moment, make_weight


@pytest.mark.parametrize("device", DEVICES)
def test_the_factor_multiplies_back_to_the_damped_and_permuted_moment(device: str) -> None:
    """lower @ lower.T * mean is H[order][:, order] with 1 % of the mean on its diagonal."""
    moment = make_moment(48, seed=0).to(device)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1)).to(device)

    factor = factor_moment(moment, order, damping=0.0)

    assert factor is not None
    assert factor.damping == 0.01
    mean = moment.diagonal().double().mean()
    expected = moment.double()[order][:, order]
    expected.diagonal().add_(0.01 * mean)
    lower = factor.lower.tril()
    torch.testing.assert_close(lower @ lower.T * mean, expected)


def test_the_factor_leaves_the_moment_as_it_was() -> None:
    """The statistics are shared by all layers of a group."""
    moment = make_moment(16, seed=0)
    before = moment.clone()

    factor_moment(moment, torch.arange(16), damping=0.01)

    assert torch.equal(moment, before)


def test_damping_grows_tenfold_until_the_moment_is_positive_definite() -> None:
    """An eigenvalue of -0.05 means needs more than 1 %; 10 % is enough and is reported."""
    moment = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))

    factor = factor_moment(moment, torch.arange(4), damping=0.01)

    assert factor is not None
    assert factor.damping == pytest.approx(0.1)


def test_a_moment_that_no_damping_mends_has_no_factor() -> None:
    """The caller is told, so nothing falls back in silence."""
    moment = torch.diag(torch.tensor([8.0, 1.0, -5.0]))

    assert factor_moment(moment, torch.arange(3), damping=0.01) is None


def test_a_zero_moment_has_no_factor() -> None:
    """There is nothing to compensate by."""
    assert factor_moment(torch.zeros(4, 4), torch.arange(4), damping=0.01) is None


def test_dead_columns_are_decoupled_from_all_others() -> None:
    """Their part of the factor is diagonal: they neither give nor take compensation."""
    moment = make_moment(12, seed=3)
    moment[5] = 0.0
    moment[:, 5] = 0.0

    factor = factor_moment(moment, torch.arange(12), damping=0.01)

    assert factor is not None
    lower = factor.lower.tril()
    assert lower[5, 5] > 0
    assert lower[5].count_nonzero() == 1
    assert lower[:, 5].count_nonzero() == 1


@pytest.mark.parametrize("tokens", [40, 2000])
def test_a_float32_factor_is_that_of_float64(tokens: int) -> None:
    """Also where most directions are left to the damping, and one channel is far above all."""
    moment = make_moment(320, seed=4, tokens=tokens)
    moment[7] *= 100.0
    moment[:, 7] *= 100.0
    order = torch.argsort(moment.diagonal())

    exact = factor_moment(moment, order, damping=0.01)
    single = factor_moment(moment, order, 0.01, torch.float32)

    assert exact is not None
    assert single is not None
    assert single.lower.dtype == torch.float32
    assert single.damping == exact.damping
    pivots = exact.lower.diagonal()
    torch.testing.assert_close(single.lower.diagonal().double(), pivots, rtol=1e-3, atol=0)
    difference = (single.lower.double().tril() - exact.lower.tril()) / pivots
    assert difference.abs().max() < 2e-3 * (exact.lower.tril() / pivots).abs().max()


def test_float64_helps_where_float32_fails() -> None:
    """Under the same damping: more would cost quality."""
    # 1 % of the mean and this leave 3e-10, which float32 rounds to nothing.
    moment = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.007481296546757221]))

    factor = factor_moment(moment, torch.arange(4), 0.01, torch.float32)

    assert factor is not None
    assert factor.damping == 0.01
    assert factor.lower.dtype == torch.float64


def test_few_tokens_ask_for_a_ridge_and_many_do_not() -> None:
    """Half the mean at a token a column, a thousandth at more than twenty."""
    assert sampling_ridge(tokens=64, size=64) == 0.5
    assert sampling_ridge(tokens=24 * 64, size=64) < 0.001
    assert sampling_ridge(tokens=0, size=64) == 1.0


def test_row_losses_are_the_quadratic_form_of_each_row() -> None:
    """Against float64, over more rows than one chunk holds at this width."""
    error, moment = make_weight(40, 64, seed=0), make_moment(64, seed=0)

    torch.testing.assert_close(
        row_losses(error, moment), exact_losses(error, moment), rtol=1e-5, atol=0
    )


def test_losses_are_summed_over_panels_of_columns() -> None:
    """What lies above the diagonal counts twice, whether or not the last panel is narrow."""
    error, moment = make_weight(5, 1100, seed=1), make_moment(1100, seed=1, tokens=600)

    torch.testing.assert_close(
        row_losses(error, moment), exact_losses(error, moment), rtol=1e-5, atol=0
    )
