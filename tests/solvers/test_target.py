"""The target of a layer whose input has drifted, against least squares on the tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.numerics.linalg import sampling_ridge
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


def stats_of(original: torch.Tensor, inputs: torch.Tensor, sampled: int = 4) -> LayerStats:
    """Second moment and drift of the tokens; one in so many is in the sample."""
    count, moved = len(inputs), original - inputs
    return LayerStats(
        (inputs.T @ inputs / count).float(),
        count,
        sample=inputs[::sampled].float(),
        drift=(moved.T @ inputs / count).float(),
        drift_sample=moved[::sampled].float(),
    )


def targets_of(weights: list[torch.Tensor], stats: LayerStats) -> list[torch.Tensor]:
    """The targets where there have to be some."""
    targets = follow_drift(weights, stats)
    assert targets is not None
    return targets


def test_the_target_answers_as_the_original_did() -> None:
    """Close to the least-squares fit, and far better than the weights as they were."""
    original, inputs = make_inputs(4096, 32)
    weights = [make_weight(rows, 32, rows) for rows in (5, 9)]

    targets = targets_of(weights, stats_of(original, inputs))

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
    """Neither where it was not followed, nor where it is nothing, nor where no token can judge."""
    weight = make_weight(4, 16, 0)
    original, inputs = make_inputs(128, 16)
    stats = stats_of(original, inputs)

    for unknown in (
        replace(stats, drift=None, drift_sample=None),
        stats_of(inputs, inputs),
        replace(stats, drift_sample=None),
        replace(stats, sample=stats.sample[:0], drift_sample=stats.sample[:0]),
        replace(stats, tokens=1, sample=stats.sample[:1], drift_sample=stats.drift_sample[:1]),
    ):
        assert follow_drift([weight], unknown) is None


@pytest.mark.parametrize("tokens", [40, 64, 256])
def test_a_drift_that_does_not_come_from_the_input_is_not_followed(tokens: int) -> None:
    """Few tokens fit noise, and held-out ones do not; also where all of them are in the sample."""
    generator = torch.Generator().manual_seed(tokens)
    inputs, noise = torch.randn(2, tokens, 32, generator=generator, dtype=torch.float64)

    for sampled in (1, 4):
        stats = stats_of(inputs + noise, inputs, sampled)
        assert follow_drift([make_weight(8, 32, 0)], stats) is None


def test_held_out_tokens_are_judged_by_the_fit_to_all_others() -> None:
    """Against least squares with the same ridge on the other tokens themselves.

    Drifts are moved from what the input explains to noise: the decision turns where the reference's
    does.
    """
    generator = torch.Generator().manual_seed(5)
    inputs, noise = torch.randn(2, 256, 16, generator=generator, dtype=torch.float64)
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    weight, decisions = make_weight(8, 16, 0), []
    for explained in torch.linspace(0.0, 0.12, 25).tolist():
        moved = explained * inputs @ mixing + noise
        found = follow_drift([weight], stats_of(inputs + moved, inputs))
        decisions.append((found is not None, helps_slowly(weight, inputs, moved)))

    assert all(found == expected for found, expected in decisions)
    assert len({found for found, _ in decisions}) == 2


def helps_slowly(weight: torch.Tensor, inputs: torch.Tensor, moved: torch.Tensor) -> bool:
    """Whether every fourth token's output error falls by 0.5 % with the fit to the others."""
    held = torch.arange(len(inputs)) % 4 == 0
    rows, change = inputs[~held], moved[~held]
    count, size = rows.shape
    gram = rows.T @ rows / count
    ridge = sampling_ridge(count, size) * gram.diagonal().mean()
    fit = torch.linalg.solve(gram + ridge * torch.eye(size), rows.T @ change / count)
    share = count / (count + 8 * size)
    before = (moved[held] @ weight.double().T).square().sum()
    after = ((moved[held] - share * inputs[held] @ fit) @ weight.double().T).square().sum()
    return bool(after < 0.995 * before)


def test_a_fold_changes_the_target_as_it_changes_the_weight() -> None:
    """Scaled columns against the statistics of the divided input."""
    original, inputs = make_inputs(512, 16)
    stats, weight = stats_of(original, inputs), make_weight(4, 16, 0)
    scale = torch.exp(torch.randn(16, generator=torch.Generator().manual_seed(1)) / 4)

    (expected,) = targets_of([weight], stats)
    (found,) = targets_of([weight * scale], scale_stats(stats, scale))

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
    sample = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    known = replace(stats, drift=drift, sample=sample, drift_sample=size * sample)

    targets = follow_drift([weight], known)

    assert targets is None or bool(targets[0].isfinite().all())
