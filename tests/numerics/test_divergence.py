"""Tests of quantkit.numerics.divergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantkit.numerics.divergence import compare_logits, find_most_probable, quick_divergence


def rank_slowly(logits: np.ndarray, count: int) -> list[int]:
    """The most probable tokens by a full sort; of equal ones the lowest id first."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:count]


def slow_reference(
    baseline: np.ndarray, candidate: np.ndarray, targets: np.ndarray
) -> dict[str, list[float]]:
    """The textbook sums, one position and one vocabulary entry at a time, in extended precision."""
    names = "baseline_nll candidate_nll kl reverse_kl agree top5_agreement lost won"
    found: dict[str, list[float]] = {name: [] for name in names.split()}
    for b, c, target in zip(baseline, candidate, targets, strict=True):
        b, c = b.astype(np.longdouble), c.astype(np.longdouble)
        log_p = b - b.max() - np.log(np.exp(b - b.max()).sum())
        log_q = c - c.max() - np.log(np.exp(c - c.max()).sum())
        total, reverse = np.longdouble(0), np.longdouble(0)
        for lp, lq in zip(log_p, log_q, strict=True):
            total += np.exp(lp) * (lp - lq)
            reverse += np.exp(lq) * (lq - lp)
        first, second = rank_slowly(b, 5), rank_slowly(c, 5)
        row = (
            float(-log_p[target]),
            float(-log_q[target]),
            float(total),
            float(reverse),
            first[0] == second[0],
            sum(token in second for token in first) / len(first),
            first[0] == target != second[0],
            second[0] == target != first[0],
        )
        for name, value in zip(found, row, strict=True):
            found[name].append(value)
    return found


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-3, 0.1, 3.0])
def test_metrics_equal_the_slow_reference_from_tiny_to_large_differences(noise: float) -> None:
    """All numbers agree with a slow reference over eight orders of magnitude of KL."""
    rng = np.random.default_rng(0)
    baseline = rng.normal(0, 3, (12, 50))
    candidate = baseline + rng.normal(0, noise, baseline.shape)
    targets = np.r_[baseline[:4].argmax(1), candidate[4:8].argmax(1), rng.integers(0, 50, 4)]

    got = compare_logits(*map(torch.from_numpy, (baseline, candidate, targets)))

    want = slow_reference(baseline, candidate, targets)
    for name in ("baseline_nll", "candidate_nll"):
        np.testing.assert_allclose(getattr(got, name), want[name], rtol=1e-13)
    for name in ("kl", "reverse_kl"):
        np.testing.assert_allclose(getattr(got, name), want[name], rtol=1e-7, atol=1e-16)
    for name in ("agree", "top5_agreement", "lost", "won"):
        assert getattr(got, name).tolist() == pytest.approx(want[name]), name
    log_p = torch.log_softmax(torch.from_numpy(baseline), dim=-1)
    assert got.baseline_top.tolist() == [rank_slowly(row, 5) for row in baseline]
    torch.testing.assert_close(got.baseline_top_log_p, log_p.gather(-1, got.baseline_top))


def test_a_case_solved_by_hand() -> None:
    """p = (1/2, 1/2) and q = (1/4, 3/4): KL = log 2 - (log 3) / 2, and the nll are logs.

    Both hold both tokens among their five; only the baseline puts token 0 first, as of equal ones.
    """
    baseline = torch.zeros(1, 2)
    candidate = torch.tensor([[0.0, math.log(3)]])

    got = compare_logits(baseline, candidate, torch.tensor([0]))

    assert got.kl.item() == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-7)
    assert got.reverse_kl.item() == pytest.approx(0.75 * math.log(3) - math.log(2), rel=1e-7)
    assert (got.top5_agreement.item(), got.lost.item(), got.won.item()) == (1.0, True, False)
    assert got.baseline_nll.item() == pytest.approx(math.log(2), rel=1e-12)
    assert got.candidate_nll.item() == pytest.approx(math.log(4), rel=1e-7)


def test_the_direction_is_baseline_to_candidate() -> None:
    """Exchanging the two models changes the divergence as the definition says."""
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()

    forward = compare_logits(p, q, torch.tensor([0])).kl.item()
    backward = compare_logits(q, p, torch.tensor([0])).kl.item()
    assert compare_logits(p, q, torch.tensor([0])).reverse_kl.item() == backward

    assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    assert backward == pytest.approx(0.5 * math.log(1 / 1.8) + 0.5 * math.log(5), rel=1e-6)


def test_equal_logits_give_exactly_zero() -> None:
    """A copy of the baseline is recognised by a divergence of 0.0, not of nearly zero."""
    logits = torch.randn(9, 31, generator=torch.Generator().manual_seed(0)) * 5

    got = compare_logits(logits, logits.clone(), torch.zeros(9, dtype=torch.int64))

    assert got.kl.tolist() == got.reverse_kl.tolist() == [0.0] * 9
    assert got.agree.all()
    assert got.top5_agreement.tolist() == [1.0] * 9
    assert not (got.lost | got.won).any()


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1.0, 300.0])
def test_divergence_is_never_negative(noise: float) -> None:
    """Also where the true value lies below the rounding of the sums, and after a constant shift."""
    generator = torch.Generator().manual_seed(1)
    baseline = torch.randn(200, 64, generator=generator, dtype=torch.float64) * 10
    candidate = baseline + noise * torch.randn(200, 64, generator=generator) + 1 / 3

    got = compare_logits(baseline, candidate, torch.zeros(200, dtype=torch.int64))

    assert (got.kl >= 0).all()
    assert (got.reverse_kl >= 0).all()


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


def test_a_flip_is_lost_or_won_by_the_token_that_came() -> None:
    """Both right, only the baseline, only the artifact, neither: positions of their own."""
    baseline = torch.tensor([[2.0, 1, 0], [2.0, 1, 0], [0, 1, 2.0], [0, 1, 2.0]])
    candidate = torch.tensor([[3.0, 1, 0], [0, 1, 2.0], [2.0, 1, 0], [2.0, 1, 0]])

    got = compare_logits(baseline, candidate, torch.tensor([0, 0, 0, 1]))

    assert got.lost.tolist() == [False, True, False, False]
    assert got.won.tolist() == [False, False, True, False]


@pytest.mark.parametrize("vocabulary", [1, 3, 5, 64, 65, 127, 1000])
@pytest.mark.parametrize("values", [2, 6, 10**9])
def test_the_most_probable_tokens_are_those_of_a_full_sort(vocabulary: int, values: int) -> None:
    """Equal logits, of which 16 bits make many, are ranked by id; fewer than five are all."""
    rng = np.random.default_rng(vocabulary)
    logits = rng.integers(0, values, (9, vocabulary)).astype(np.float32)

    got = find_most_probable(torch.from_numpy(logits), 5)

    assert got.tolist() == [rank_slowly(row, 5) for row in logits]


def test_tokens_that_cannot_come_are_ranked_without_an_error() -> None:
    """Minus infinity everywhere but once: the ids stay within the vocabulary."""
    logits = torch.full((2, 70), -torch.inf)
    logits[:, 69] = 1

    got = find_most_probable(logits, 5)

    assert got[:, 0].tolist() == [69, 69]
    assert int(got.max()) < 70


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
