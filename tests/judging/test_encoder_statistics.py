"""Tests of quantkit.judging.encoder_statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantkit.judging.encoder_statistics import (
    percentile_interval,
    resampled_interval,
    share_interval,
)
from quantkit.judging.percentile import texts_for_percentile


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (9, 10, 0.5550, 0.9975)],
)
def test_the_interval_of_a_share_is_that_of_the_tables(
    hits: int, count: int, low: float, high: float
) -> None:
    """Clopper and Pearson's 95 % limits as they are printed."""
    assert share_interval(hits, count, 0.95) == pytest.approx((low, high), abs=5e-5)


def test_a_few_texts_that_all_agree_prove_little() -> None:
    """Resampling would say that eight of eight are 100 %, for certain."""
    assert share_interval(8, 8, 0.95)[0] == pytest.approx(0.025 ** (1 / 8))
    assert share_interval(8, 8, 0.95)[0] < 0.7
    assert share_interval(128, 128, 0.95)[0] > 0.97


def test_the_interval_of_a_percentile_holds_it_as_often_as_it_says() -> None:
    """Of 1,000 draws from a uniform distribution, whose 1st percentile is 0.01."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        low, high = percentile_interval(rng.random(500), 0.95)
        inside += low <= 0.01 <= high

    assert 0.94 <= inside / 1000 <= 1


def test_a_percentile_of_few_texts_has_no_lower_bound() -> None:
    """No value of 367 lies below the 1st percentile with a probability of more than 2.5 %."""
    needed = texts_for_percentile(0.95)
    values = np.linspace(0.9, 1, needed)

    assert needed == 368
    assert 0.99**needed <= 0.025 < 0.99 ** (needed - 1)
    assert percentile_interval(values, 0.95)[0] == 0.9
    assert percentile_interval(values[1:], 0.95)[0] == -1
    assert percentile_interval(values[:1], 0.95) == (-1, 0.9)


def test_intervals_of_a_resampled_mean_are_about_those_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(size=200)

    low, high = resampled_interval(lambda counts: counts @ values / 200, 200, 0.95, 0)

    half = 1.96 * values.std() / math.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_one_row_has_an_interval_of_one_point() -> None:
    assert resampled_interval(lambda counts: 0.3 * counts[:, 0], 1, 0.95, 0) == (0.3, 0.3)


def test_each_draw_has_as_many_rows_as_there_are() -> None:
    seen = []

    def count_rows(counts: np.ndarray) -> np.ndarray:
        seen.append(counts)
        return counts.sum(axis=1)

    assert resampled_interval(count_rows, 7, 0.9, 0) == (7, 7)
    drawn = np.concatenate(seen)
    assert drawn.shape == (10_000, 7)
    assert drawn.mean(axis=0) == pytest.approx(np.ones(7), abs=0.05)
