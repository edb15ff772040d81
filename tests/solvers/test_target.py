"""The target of a layer whose input has drifted, against least squares on the tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.records import LayerStats
from quantkit.solvers import follow_drift, scale_stats
from tests.solvers.cases import hard_stats, make_moment, make_weight


def make_inputs(tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What tokens bring in the original model, and what they bring now; float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = 0.1 * torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mixing += torch.eye(columns)
    original = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    noise = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    return original, 0.6 * original + 0.3 * noise


def stats_of(original: torch.Tensor, inputs: torch.Tensor) -> LayerStats:
    """Second moment and drift of the tokens."""
    count = len(inputs)
    return LayerStats(
        (inputs.T @ inputs / count).float(),
        count,
        drift=((original - inputs).T @ inputs / count).float(),
    )


def test_the_target_answers_as_the_original_did() -> None:
    """Close to the least-squares fit, and far better than the weights as they were."""
    original, inputs = make_inputs(4096, 32)
    weights = [make_weight(rows, 32, rows) for rows in (5, 9)]

    targets = follow_drift(weights, stats_of(original, inputs))

    for weight, target in zip(weights, targets, strict=True):
        wanted = original @ weight.double().T
        fit = torch.linalg.lstsq(inputs, wanted).solution
        error, best, before = (
            float((inputs @ answer - wanted).square().sum())
            for answer in (target.double().T, fit, weight.double().T)
        )
        assert best <= error < 1.1 * best
        assert error < 0.8 * before


def test_without_a_drift_the_weights_stay() -> None:
    """Neither where it was not followed nor where it is nothing."""
    weight, moment = make_weight(4, 16, 0), make_moment(16, 0)

    (same,) = follow_drift([weight], LayerStats(moment, 128))
    (still,) = follow_drift([weight], LayerStats(moment, 128, drift=torch.zeros(16, 16)))

    assert torch.equal(same, weight)
    assert torch.equal(still, weight)


def test_a_fold_changes_the_target_as_it_changes_the_weight() -> None:
    """Scaled columns against the statistics of the divided input."""
    original, inputs = make_inputs(512, 16)
    stats, weight = stats_of(original, inputs), make_weight(4, 16, 0)
    scale = torch.exp(torch.randn(16, generator=torch.Generator().manual_seed(1)) / 4)

    (expected,) = follow_drift([weight], stats)
    (found,) = follow_drift([weight * scale], scale_stats(stats, scale))

    # Not equal: the damping is not folded.
    assert (found / scale - expected).norm() < 0.05 * (expected - weight).norm()


@settings(max_examples=40, deadline=None)
@given(
    stats=hard_stats(32),
    size=st.sampled_from((0.0, 1e-6, 1.0, 1e12, float("inf"))),
    rows=st.sampled_from((0.03, 3e38)),
)
def test_targets_are_always_finite(stats: LayerStats, size: float, rows: float) -> None:
    """Second moments that lack rank, drifts that explode, weights at the end of the range."""
    drift = size * make_moment(32, 3)
    weight = make_weight(4, 32, 0).sign() * rows

    (target,) = follow_drift([weight], replace(stats, drift=drift))

    assert target.isfinite().all()
