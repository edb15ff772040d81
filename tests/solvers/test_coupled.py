"""Rounding for the divergence of the whole model: its objective, its guarantee, its parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import decode
from quantkit.records import LayerStats
from quantkit.schemes import EFFORTS, SCHEMES
from quantkit.solvers.coupled import round_coupled
from quantkit.solvers.gptq import round_compensated
from quantkit.solvers.rounding import Rounding
from quantkit.solvers.rtn import round_plainly
from tests.solvers.cases import (
    DEVICES,
    INTEGER_SCHEMES,
    NORMAL,
    hard_stats,
    hard_weights,
    make_moment,
    make_weight,
)

SCHEME_NAMES = (*INTEGER_SCHEMES, "w8a8", "fp8_dynamic")


def exact_loss(
    weight: Tensor, rounding: Rounding, scheme_name: str, fisher: Tensor, moment: Tensor
) -> float:
    """tr(F E H E^T) in float64, F with the damping of the solver."""
    decoded = decode(rounding.codes, rounding.scale, rounding.zero_point, SCHEMES[scheme_name])
    error = weight.double() - decoded.double()
    damped = fisher.double() + 0.3 * fisher.double().diagonal().mean() * torch.eye(len(fisher))
    return float((damped @ error @ moment.double() * error).sum())


def group_size_of(scheme_name: str) -> int | None:
    """32 where the scheme has groups."""
    return 32 if SCHEMES[scheme_name].granularity == "group" else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_coupled_rows_do_better_than_gptq_on_the_models_objective(scheme: str, device: str) -> None:
    """By more than a tenth where outputs are strongly coupled."""
    weight = make_weight(96, 64, 0)
    fisher, stats = make_moment(96, 1), LayerStats(make_moment(64, 2), 512)
    group_size = 64 if SCHEMES[scheme].granularity == "group" else None
    options = (SCHEMES[scheme], group_size, torch.bfloat16)
    on_device = LayerStats(stats.second_moment.to(device), stats.tokens)
    gptq = round_compensated(weight, *options, stats, NORMAL)

    found = round_coupled(weight.to(device), *options, on_device, NORMAL, [fisher.to(device)])

    assert found.codes.device.type == device
    moved = Rounding(
        found.codes.cpu(),
        found.scale.cpu(),
        None if found.zero_point is None else found.zero_point.cpu(),
    )
    mine = exact_loss(weight, moved, scheme, fisher, stats.second_moment)
    assert mine < 0.9 * exact_loss(weight, gptq, scheme, fisher, stats.second_moment)
    assert found.losses is not None
    assert found.plain_losses is not None
    assert found.losses.shape == found.plain_losses.shape == (96,)


@settings(max_examples=40, deadline=None)
@given(
    weight=hard_weights(12, 32),
    stats=hard_stats(32),
    kind=st.sampled_from(("plain", "few", "zero", "tiny", "one")),
    scheme=st.sampled_from(SCHEME_NAMES),
    effort=st.sampled_from(sorted(EFFORTS)),
)
def test_never_worse_than_plain_rounding(
    weight: Tensor, stats: LayerStats, kind: str, scheme: str, effort: str
) -> None:
    """Zero, huge, constant and denormal rows; second moments and F that lack rank or are zero."""
    fisher = make_moment(12, 5, 3 if kind == "few" else None)
    fisher *= {"zero": 0.0, "tiny": 1e-30}.get(kind, 1.0)
    if kind == "one":
        fisher = torch.zeros(12, 12)
        fisher[4, 4] = 1.0
    options = (SCHEMES[scheme], group_size_of(scheme), torch.bfloat16)

    found = round_coupled(weight, *options, stats, EFFORTS[effort], [fisher])

    decoded = decode(found.codes, found.scale, found.zero_point, SCHEMES[scheme])
    assert decoded.isfinite().all()
    if kind != "zero":
        plain = round_plainly(weight, *options)
        unit = float(weight.abs().max()) or 1.0
        mine, other = (
            exact_loss(
                weight / unit,
                Rounding(each.codes, each.scale.double() / unit, each.zero_point),
                scheme,
                fisher,
                stats.second_moment,
            )
            for each in (found, plain)
        )
        assert mine <= other * (1 + 1e-3) + 1e-30


def test_layers_joined_are_solved_as_on_their_own() -> None:
    """F couples rows within a layer and a block only."""
    weights = [make_weight(rows, 64, rows) for rows in (24, 40, 24)]
    fishers = [make_moment(rows, rows + 1) for rows in (24, 40, 24)]
    # The middle one in blocks of 16 rows, the last of which has 8.
    middle = torch.zeros(40, 16)
    for start in (0, 16, 32):
        stop = min(40, start + 16)
        middle[start:stop, : stop - start] = fishers[1][start:stop, start:stop]
    fishers[1] = middle
    stats = LayerStats(make_moment(64, 2), 512)
    options = (SCHEMES["w4a16"], 32, torch.bfloat16, stats, NORMAL)

    joined = round_coupled(torch.cat(weights), *options, fishers)

    start = 0
    for weight, fisher in zip(weights, fishers, strict=True):
        alone = round_coupled(weight, *options, [fisher])
        rows = slice(start, start + len(weight))
        assert (joined.codes[rows] != alone.codes).float().mean() < 0.01
        start += len(weight)


def test_rows_that_share_scales_are_refused() -> None:
    """Blocks of 128 rows cannot be rounded one row after the other."""
    stats = LayerStats(make_moment(128, 0), 1024)
    with pytest.raises(ValueError, match="share scales"):
        round_coupled(
            make_weight(128, 128, 0),
            SCHEMES["fp8_block"],
            None,
            torch.bfloat16,
            stats,
            NORMAL,
            [torch.eye(128)],
        )
