"""Tests of quantkit.numerics.divergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantkit.numerics.divergence import compare_logits, quick_divergence


def slow_reference(
    baseline: np.ndarray, candidate: np.ndarray, targets: np.ndarray
) -> tuple[list[float], list[float], list[float], list[bool]]:
    """The textbook sums, one position and one vocabulary entry at a time, in extended precision."""
    baseline_nll, candidate_nll, kl, agree = [], [], [], []
    for b, c, target in zip(baseline, candidate, targets, strict=True):
        b, c = b.astype(np.longdouble), c.astype(np.longdouble)
        log_p = b - b.max() - np.log(np.exp(b - b.max()).sum())
        log_q = c - c.max() - np.log(np.exp(c - c.max()).sum())
        total = np.longdouble(0)
        for lp, lq in zip(log_p, log_q, strict=True):
            total += np.exp(lp) * (lp - lq)
        baseline_nll.append(float(-log_p[target]))
        candidate_nll.append(float(-log_q[target]))
        kl.append(float(total))
        agree.append(int(b.argmax()) == int(c.argmax()))
    return baseline_nll, candidate_nll, kl, agree


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-3, 0.1, 3.0])
def test_metrics_equal_the_slow_reference_from_tiny_to_large_differences(noise: float) -> None:
    """All four numbers agree with a slow reference over eight orders of magnitude of KL."""
    rng = np.random.default_rng(0)
    baseline = rng.normal(0, 3, (7, 50))
    candidate = baseline + rng.normal(0, noise, baseline.shape)
    targets = rng.integers(0, 50, 7)

    got = compare_logits(*map(torch.from_numpy, (baseline, candidate, targets)))

    want = slow_reference(baseline, candidate, targets)
    np.testing.assert_allclose(got.baseline_nll, want[0], rtol=1e-13)
    np.testing.assert_allclose(got.candidate_nll, want[1], rtol=1e-13)
    np.testing.assert_allclose(got.kl, want[2], rtol=1e-7, atol=1e-16)
    assert got.agree.tolist() == want[3]


def test_a_case_solved_by_hand() -> None:
    """p = (1/2, 1/2) and q = (1/4, 3/4): KL = log 2 - (log 3) / 2, and the nll are logs."""
    baseline = torch.zeros(1, 2)
    candidate = torch.tensor([[0.0, math.log(3)]])

    got = compare_logits(baseline, candidate, torch.tensor([0]))

    assert got.kl.item() == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-7)
    assert got.baseline_nll.item() == pytest.approx(math.log(2), rel=1e-12)
    assert got.candidate_nll.item() == pytest.approx(math.log(4), rel=1e-7)


def test_the_direction_is_baseline_to_candidate() -> None:
    """Exchanging the two models changes the divergence as the definition says."""
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()

    forward = compare_logits(p, q, torch.tensor([0])).kl.item()
    backward = compare_logits(q, p, torch.tensor([0])).kl.item()

    assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    assert backward == pytest.approx(0.5 * math.log(1 / 1.8) + 0.5 * math.log(5), rel=1e-6)


def test_equal_logits_give_exactly_zero() -> None:
    """A copy of the baseline is recognised by a divergence of 0.0, not of nearly zero."""
    logits = torch.randn(9, 31, generator=torch.Generator().manual_seed(0)) * 5

    got = compare_logits(logits, logits.clone(), torch.zeros(9, dtype=torch.int64))

    assert got.kl.tolist() == [0.0] * 9
    assert got.agree.all()


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1.0, 300.0])
def test_divergence_is_never_negative(noise: float) -> None:
    """Also where the true value lies below the rounding of the sums, and after a constant shift."""
    generator = torch.Generator().manual_seed(1)
    baseline = torch.randn(200, 64, generator=generator, dtype=torch.float64) * 10
    candidate = baseline + noise * torch.randn(200, 64, generator=generator) + 1 / 3

    got = compare_logits(baseline, candidate, torch.zeros(200, dtype=torch.int64))

    assert (got.kl >= 0).all()


def test_probabilities_that_underflow_are_counted() -> None:
    """A certain baseline against a candidate that is certain of another token costs the gap."""
    baseline, candidate = torch.tensor([[2000.0, 0.0]]), torch.tensor([[0.0, 2000.0]])

    got = compare_logits(baseline, candidate, torch.tensor([0]))

    assert got.kl.item() == pytest.approx(2000.0, rel=1e-3)
    assert got.agree.tolist() == [False]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_show(poison: float) -> None:
    """A poisoned logit makes its own position's divergence not finite, and no other's."""
    baseline = torch.zeros(3, 4)
    candidate = baseline.clone()
    candidate[1, 2] = poison

    kl = compare_logits(baseline, candidate, torch.zeros(3, dtype=torch.int64)).kl

    assert torch.isfinite(kl).tolist() == [True, False, True]


def test_ties_go_to_the_lowest_token_id() -> None:
    """Two equally probable tokens are the same first choice in both models."""
    baseline = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    candidate = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])

    got = compare_logits(baseline, candidate, torch.tensor([0, 0]))

    assert got.agree.tolist() == [True, False]


def test_shapes_that_do_not_fit_are_refused() -> None:
    """Different vocabularies, or a target too few, are an error and not a broadcast."""
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_logits(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets"):
        compare_logits(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0])
def test_the_quick_divergence_is_near_the_exact_one(size: float) -> None:
    """Over all sizes of differences that a candidate makes, and never negative."""
    generator = torch.Generator().manual_seed(0)
    baseline = 3 * torch.randn(64, 500, generator=generator)
    candidate = baseline + size * torch.randn(64, 500, generator=generator)
    exact = compare_logits(baseline, candidate, torch.zeros(64, dtype=torch.int64)).kl

    quick = quick_divergence(torch.log_softmax(baseline, dim=-1), candidate)

    torch.testing.assert_close(quick.double(), exact, rtol=5e-3, atol=0)
    assert float(quick.double().mean()) == pytest.approx(float(exact.mean()), rel=1e-3)
    assert bool((quick >= 0).all())


def test_the_quick_divergence_of_equal_logits_is_zero() -> None:
    """Exactly, as the exact one's is."""
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))

    assert not quick_divergence(torch.log_softmax(logits, dim=-1), logits).any()
