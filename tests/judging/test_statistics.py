"""Tests of quantkit.judging.statistics."""

from __future__ import annotations

import math
import tracemalloc
from statistics import NormalDist, fmean

import numpy as np
import pytest

from quantkit.judging.statistics import (
    choose_bounds,
    mean_intervals,
    resample_means,
    widened_quantile,
)


def slow_bca(values: list[float], means: list[float], confidence: float) -> tuple[float, float]:
    """The published formulas with loops: bias from counts, acceleration from the jackknife."""
    normal = NormalDist()
    observed = fmean(values)
    below = sum(1.0 if m < observed else 0.5 if m == observed else 0.0 for m in means)
    bias = normal.inv_cdf(below / len(means))
    left_out = [fmean(values[:i] + values[i + 1 :]) for i in range(len(values))]
    center = fmean(left_out)
    cubes = sum((center - value) ** 3 for value in left_out)
    squares = sum((center - value) ** 2 for value in left_out)
    acceleration = cubes / (6 * squares**1.5)
    z = widened_quantile(confidence, len(values))
    ordered = sorted(means)
    bounds = []
    for quantile in (-z, z):
        level = normal.cdf(bias + (bias + quantile) / (1 - acceleration * (bias + quantile)))
        place = level * (len(ordered) - 1)
        low = min(int(place), len(ordered) - 2)
        bounds.append(ordered[low] + (place - low) * (ordered[low + 1] - ordered[low]))
    return bounds[0], bounds[1]


@pytest.mark.parametrize("count", [8, 25, 128])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_interval_equals_the_slow_reference(count: int, confidence: float) -> None:
    """On skewed values, where bias and acceleration both matter."""
    values = np.random.default_rng(count).lognormal(0, 1, count)
    means = resample_means(values[:, None], seed=3, resamples=2000)[:, 0]

    got = choose_bounds(values, means, confidence)

    assert got == pytest.approx(slow_bca(values.tolist(), means.tolist(), confidence), rel=1e-9)


def test_resampled_means_are_means_of_rows_drawn_with_replacement() -> None:
    """The same rows for all columns: a column that is a multiple of another stays one."""
    values = np.arange(6.0)[:, None] * np.array([1.0, -3.0])

    means = resample_means(values, seed=0, resamples=5000)

    assert means.shape == (5000, 2)
    np.testing.assert_allclose(means[:, 1], -3 * means[:, 0], atol=1e-12)
    np.testing.assert_allclose(means[:, 0] * 6, np.round(means[:, 0] * 6), atol=1e-9)
    assert means[:, 0].mean() == pytest.approx(2.5, abs=0.04)
    assert means[:, 0].var() == pytest.approx(35 / 12 / 6, rel=0.06)


@pytest.mark.parametrize(
    ("count", "confidence", "student_t"),
    [(8, 0.95, 2.3646), (11, 0.99, 3.1693), (31, 0.95, 2.0423), (31, 0.8, 1.3104)],
)
def test_the_quantile_is_students_t_from_the_tables(
    count: int, confidence: float, student_t: float
) -> None:
    """Printed tables of Student's t, widened for the variance that divides by N."""
    want = student_t * math.sqrt(count / (count - 1))

    assert widened_quantile(confidence, count) == pytest.approx(want, rel=2e-4)


def test_the_interval_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    """Nothing but the values, the confidence and the seed goes in."""
    values = np.random.default_rng(0).normal(size=(20, 3))

    first = mean_intervals(values, 0.95, seed=0)

    np.testing.assert_array_equal(first, mean_intervals(values, 0.95, seed=0))
    assert not np.array_equal(first, mean_intervals(values, 0.95, seed=1))


def test_equal_values_have_an_interval_of_one_point() -> None:
    """Also for one window, and where a sum would round: 0.1 has no exact mean."""
    assert mean_intervals(np.full((9, 1), 0.1), 0.95, 0).tolist() == [[0.1, 0.1]]
    assert mean_intervals(np.full((1, 1), 0.7), 0.95, 0).tolist() == [[0.7, 0.7]]


@pytest.mark.parametrize("confidence", [0.51, 0.95, 0.999999])
@pytest.mark.parametrize("outlier", [-1e9, 1e9])
def test_extreme_values_keep_the_bounds_within_the_data(confidence: float, outlier: float) -> None:
    """One window that dwarfs the others is the worst case of the acceleration."""
    values = np.array([outlier, *np.linspace(0, 1, 7)])[:, None]

    low, high = mean_intervals(values, confidence, 0)[0]

    assert values.min() <= low <= high <= values.max()


def test_a_mean_is_within_its_interval_and_more_confidence_widens_it() -> None:
    """Nested intervals around the measured value."""
    values = np.random.default_rng(5).lognormal(0, 0.5, (40, 1))

    narrow, wide = (mean_intervals(values, confidence, 0)[0] for confidence in (0.8, 0.99))

    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("name", "count", "at_least"),
    [("normal", 8, 0.92), ("normal", 32, 0.93), ("skewed", 16, 0.9), ("agreement", 32, 0.93)],
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    name: str, count: int, at_least: float
) -> None:
    """2,000 simulated evaluations at a confidence of 0.95, where the true mean is known.

    `skewed` is log-normal like the divergence of windows, `agreement` a share of 511 positions
    whose probability differs between windows. Strong skew in few windows is what bootstrap
    intervals are known to cover less well.
    """
    rng = np.random.default_rng(11)
    inside = 0
    for trial in range(2000):
        if name == "normal":
            values, truth = rng.normal(1, 1, count), 1.0
        elif name == "skewed":
            values, truth = rng.lognormal(0, 0.5, count), math.exp(0.125)
        else:
            values, truth = rng.binomial(511, rng.beta(90, 10, count)) / 511, 0.9
        means = resample_means(values[:, None], seed=trial, resamples=1000)[:, 0]
        low, high = choose_bounds(values, means, 0.95)
        inside += low <= truth <= high

    assert at_least <= inside / 2000 <= 0.98


def test_memory_does_not_grow_with_the_resamples() -> None:
    """All drawn window numbers at once would take 160 MB here."""
    values = np.random.default_rng(0).normal(size=(2000, 3))
    tracemalloc.start()

    resample_means(values, seed=0, resamples=10_000)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
