"""Tests of quantkit.judging.scoring: positions to windows, ranges and domains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.errors import CalibrationError
from quantkit.judging.scoring import find_ranges, select_scored, summarize_window
from quantkit.numerics.divergence import TokenMetrics, compare_logits
from quantkit.records import TokenWindows

VOCABULARY = 40


def make_positions(count: int, seed: int = 0) -> TokenMetrics:
    """Two random models at `count` positions."""
    rng = np.random.default_rng(seed)
    baseline = torch.from_numpy(rng.normal(0, 2, (count, VOCABULARY)))
    candidate = baseline + torch.from_numpy(rng.normal(0, 1, baseline.shape))
    return compare_logits(baseline, candidate, torch.from_numpy(rng.integers(0, VOCABULARY, count)))


def cut(metrics: TokenMetrics, size: int) -> list[TokenMetrics]:
    """The same positions, a few at a time."""
    fields = vars(metrics)
    return [
        TokenMetrics(**{name: tensor[start : start + size] for name, tensor in fields.items()})
        for start in range(0, len(metrics.kl), size)
    ]


@pytest.mark.parametrize(
    ("positions", "ranges"),
    [
        (1, [(0, 1)]),
        (16, [(0, 16)]),
        (23, [(0, 23)]),
        (24, [(0, 16), (16, 24)]),
        (47, [(0, 16), (16, 47)]),
        (127, [(0, 16), (16, 32), (32, 64), (64, 127)]),
        (511, [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 511)]),
        (600, [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 600)]),
    ],
)
def test_ranges_of_positions_double(positions: int, ranges: list[tuple[int, int]]) -> None:
    """They cover every position once, and the last one is no small rest."""
    assert list(find_ranges(positions)) == ranges


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_window_is_the_mean_of_its_positions(size: int) -> None:
    """Summed one position at a time: over all, over ranges and over domains."""
    metrics = make_positions(47)
    rng = np.random.default_rng(1)
    counted = rng.random(47) < 0.7
    domains = rng.integers(0, 3, 47).astype(np.int16)
    domains[domains == 1] = 5

    got = summarize_window(cut(metrics, size), counted, domains)

    def mean(name: str, chosen: list[int]) -> float:
        total = 0.0
        for position in chosen:
            total += float(getattr(metrics, name)[position])
        return total / len(chosen)

    everywhere = [position for position in range(47) if counted[position]]
    for name in ("reverse_kl", "top5_agreement", "lost", "won"):
        assert getattr(got, name) == pytest.approx(mean(name, everywhere), rel=1e-12)
    parts = [(got.whole, everywhere)]
    for (start, stop), means in zip([(0, 16), (16, 47)], got.ranges, strict=True):
        parts.append((means, [p for p in everywhere if start <= p < stop]))
    assert sorted(got.domains) == [0, 2, 5]
    for domain, means in got.domains.items():
        parts.append((means, [p for p in everywhere if domains[p] == domain]))
    for means, chosen in parts:
        assert means is not None
        assert means.tokens == len(chosen)
        assert means.kl == pytest.approx(mean("kl", chosen), rel=1e-12)
        assert means.agreement == pytest.approx(mean("agree", chosen), rel=1e-12)
        assert means.baseline_nll == pytest.approx(mean("baseline_nll", chosen), rel=1e-12)
        assert means.candidate_nll == pytest.approx(mean("candidate_nll", chosen), rel=1e-12)
    np.testing.assert_array_equal(got.kl_each, metrics.kl.float().numpy()[counted])


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_worst_position_is_that_of_the_largest_divergence_that_counts(size: int) -> None:
    """With what both models would have gone on with there, and how sure they were."""
    metrics = make_positions(30)
    order = np.argsort(-metrics.kl.numpy())
    counted = np.ones(30, dtype=bool)
    counted[order[0]] = False

    worst = summarize_window(cut(metrics, size), counted, None).worst

    assert worst.position == order[1]
    assert worst.kl == metrics.kl[worst.position].item()
    assert list(worst.candidate) == metrics.candidate_top[worst.position, :3].tolist()
    assert worst.baseline_probabilities == pytest.approx(
        metrics.baseline_top_log_p[worst.position, :3].exp().tolist()
    )
    assert list(worst.baseline_probabilities) == sorted(worst.baseline_probabilities, reverse=True)


def test_a_range_or_domain_without_a_counted_position_has_no_number() -> None:
    """An empty mean is none, and not a zero."""
    counted = np.arange(30) < 10

    got = summarize_window([make_positions(30)], counted, np.arange(30) // 10)

    assert got.ranges[1] is None
    assert got.ranges[0] is not None
    assert list(got.domains) == [0]


def test_windows_without_a_counted_token_leave_their_numbers_out() -> None:
    """What is left knows its place in the data; with nothing left there is nothing to judge."""
    ids = np.arange(12).reshape(4, 3)
    weights = np.ones((4, 3), np.float32)
    weights[1, 1:] = 0
    windows = TokenWindows(ids, weights, "test", "", domains=ids.astype(np.int16))

    got = select_scored(windows)

    assert got.numbers is not None
    assert got.domains is not None
    assert got.numbers.tolist() == [0, 2, 3]
    np.testing.assert_array_equal(got.domains, got.ids)
    numbered = TokenWindows(ids, weights, "test", "", numbers=np.array([9, 8, 7, 6]))
    assert select_scored(numbered).numbers.tolist() == [9, 7, 6]  # type: ignore[union-attr]
    with pytest.raises(CalibrationError, match="none of the evaluation tokens counts"):
        select_scored(TokenWindows(ids, 0 * weights, "test", ""))
