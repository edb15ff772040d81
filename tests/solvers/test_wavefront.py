"""Rounding by diagonals against loops over single entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, quantize
from quantkit.numerics.linalg import Factor
from quantkit.records import LayerStats
from quantkit.schemes import SCHEMES
from quantkit.solvers.gptq import compensate, factor_by_activity
from quantkit.solvers.wavefront import Panels, compensate_panels, polish_panels, widen
from tests.solvers.cases import DEVICES, INTEGER_SCHEMES, make_moment, make_weight


def make_panels(
    weight: Tensor, fisher: Tensor, scheme_name: str = "w4a16", group_size: int | None = 32
) -> Panels:
    """Panels of weights [P, B, I] under absmax scales, rounded to nearest."""
    scheme, (count, rows, columns) = SCHEMES[scheme_name], weight.shape
    flat = weight.reshape(-1, columns)
    scale, zeros = choose_absmax(flat, scheme, group_size, torch.bfloat16)
    values = quantize(flat, scale, zeros, scheme).float().reshape(weight.shape)
    if zeros is not None:
        zeros = zeros.float().reshape(count, rows, -1)
        values -= widen(zeros, columns)
    scale = scale.reshape(count, rows, -1)
    unit = torch.ones(count, rows, device=weight.device)
    return Panels(weight, values, scale, zeros, unit, fisher, scheme)


def make_case(
    count: int, rows: int, columns: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, LayerStats]:
    """Weights [count, rows, columns], F of each panel, and the statistics of the input."""
    weight = make_weight(count * rows, columns, 0).reshape(count, rows, columns)
    fisher = torch.stack([make_moment(rows, seed) for seed in range(count)])
    fisher += 0.3 * fisher.diagonal(dim1=1, dim2=2).mean() * torch.eye(rows)
    stats = LayerStats(make_moment(columns, 7).to(device), 8 * columns)
    return weight.to(device), fisher.to(device), stats


def round_entry_by_entry(panels: Panels, panel: int, factor: Factor) -> Tensor:
    """Nearest-plane rounding of one panel in float64, one entry after the other.

    With F = U U^T and H = L L^T the loss is |U^T E L|^2; each entry is chosen so that its own
    entry of U^T E L comes nearest to zero. Returns the values [B, I].
    """
    order = factor.order
    weight = panels.weight[panel].double()[:, order]
    steps = widen(panels.steps(), weight.shape[1])[panel].double()[:, order]
    upper = torch.linalg.cholesky(panels.fisher[panel].double().flip(0, 1)).flip(0, 1)
    lower = factor.lower.double()
    limits = 1 << (panels.scheme.weight_bits - 1)
    low, high = torch.full_like(weight, -limits), torch.full_like(weight, limits - 1)
    if panels.zero_point is not None:
        zeros = widen(panels.zero_point, weight.shape[1])[panel].double()[:, order]
        low, high = low - zeros, high - zeros
    error, values = torch.zeros_like(weight), torch.zeros_like(weight)
    for row in range(len(weight)):
        for column in reversed(range(weight.shape[1])):
            known = upper[: row + 1, row] @ error[: row + 1] @ lower[:, column]
            target = weight[row, column] + known / (upper[row, row] * lower[column, column])
            value = torch.round(target / steps[row, column])
            value = value.clamp(low[row, column], high[row, column])
            values[row, column] = value
            error[row, column] = weight[row, column] - value * steps[row, column]
    result = torch.empty_like(values)
    result[:, order] = values
    return result.float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_diagonals_choose_what_single_entries_choose(scheme: str, device: str) -> None:
    """More rows than a batch, several panels: the values of the slow loop."""
    weight, fisher, stats = make_case(2, 70, 32, device)
    panels = make_panels(weight, fisher, scheme)
    factor = factor_by_activity(stats)
    assert factor is not None
    expected = torch.stack([round_entry_by_entry(panels, panel, factor) for panel in range(2)])

    compensate_panels(panels, factor)

    # A target half way between two values may fall to either side in float32.
    assert (panels.values != expected).float().mean() < 0.01
    assert (panels.values - expected).abs().max() <= 1


def test_without_coupling_the_codes_are_those_of_gptq() -> None:
    """F is the identity: nothing is made up for between rows."""
    weight, _, stats = make_case(1, 12, 64)
    panels = make_panels(weight, torch.eye(12).unsqueeze(0))
    factor = factor_by_activity(stats)
    assert factor is not None

    compensate_panels(panels, factor)

    codes = compensate(weight[0], panels.scale[0], None, panels.scheme, factor)
    assert torch.equal(panels.values[0], codes.float())


@pytest.mark.parametrize("scheme", [*INTEGER_SCHEMES, "w8a8", "fp8_dynamic"])
def test_polishing_lowers_the_loss_of_every_panel(scheme: str) -> None:
    """Of plainly rounded values; the loss agrees with the formula."""
    weight, fisher, stats = make_case(3, 20, 64)
    grouped = SCHEMES[scheme].granularity == "group"
    panels = make_panels(weight, fisher, scheme, 32 if grouped else None)
    before = panels.losses(stats.second_moment)
    error = panels.error().double()
    exact = torch.einsum(
        "pab,pbi,ij,paj->p", fisher.double(), error, stats.second_moment.double(), error
    )
    assert torch.allclose(before, exact, rtol=1e-4)

    polish_panels(panels, stats.second_moment, 0.0, 2)

    assert (panels.losses(stats.second_moment) < 0.97 * before).all()
    assert (panels.scale > 0).all()


def test_a_sweep_that_raises_the_loss_is_undone() -> None:
    """Rows and columns that are nearly copies move each other far too much."""
    weight = make_weight(32, 32, 3).unsqueeze(0)
    fisher = (torch.ones(32, 32) + 1e-3 * torch.eye(32)).unsqueeze(0)
    moment = torch.ones(32, 32) + 1e-3 * torch.eye(32)
    panels = make_panels(weight, fisher)
    before = panels.losses(moment)

    polish_panels(panels, moment, 0.0, 3)

    assert (panels.losses(moment) <= before).all()
