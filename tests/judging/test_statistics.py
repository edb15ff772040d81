"""Tests of quantkit.judging.statistics."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest

from quantkit.judging.statistics import mean_intervals, student_quantile, widened_quantile


def slow_upper_bound(values: list[float], confidence: float) -> float:
    """The published formulas with loops: Hall's cubic is inverted by bisection.

    With T = (mean - truth) / error, g(T) = T + s T^2 / 3 + s^2 T^3 / 27 + s / 6 is about normal,
    where s is the skewness over the root of N. The bound is the truth at which g(T) is as low as
    Student's quantile allows. s is inflated on this side, and goes no further than the value that
    has the bound lie furthest out.
    """
    count = len(values)
    mean = fmean(values)
    second = fmean([(value - mean) ** 2 for value in values])
    third = fmean([(value - mean) ** 3 for value in values])
    error = math.sqrt(second / (count - 1))
    skewness = third / second**1.5 * math.sqrt(count * (count - 1)) / (count - 2)
    skew = skewness / math.sqrt(count)
    if skew > 0:
        skew *= 1 + 16 / count
    quantile = student_quantile(confidence, count - 1)

    def reach(s: float) -> float:
        low, high = -1000.0, 1000.0
        for _ in range(200):
            middle = (low + high) / 2
            g = middle + s * middle**2 / 3 + s**2 * middle**3 / 27 + s / 6
            low, high = (middle, high) if g < -quantile else (low, middle)
        return -low

    if skew > 0:
        grid = [step / 100 for step in range(1, 401)]
        skew = min(skew, max(grid, key=reach))
    return mean + error * reach(skew)


@pytest.mark.parametrize("count", [8, 25, 128])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_the_interval_equals_the_slow_reference(
    count: int, confidence: float, sigma: float
) -> None:
    """On skewed values; the lower bound is the upper one of what is mirrored."""
    values = np.random.default_rng(count).lognormal(0, sigma, count)

    low, high = mean_intervals(values[:, None], confidence)[0]

    assert high == pytest.approx(slow_upper_bound(values.tolist(), confidence), rel=1e-6)
    assert -low == pytest.approx(slow_upper_bound((-values).tolist(), confidence), rel=1e-6)


def test_without_skewness_it_is_students_interval() -> None:
    """Symmetric values: mean plus and minus t times the standard error."""
    values = np.array([-3.0, -2, -1, -0.5, 0.5, 1, 2, 3])
    half = student_quantile(0.95, 7) * values.std(ddof=1) / math.sqrt(8)

    low, high = mean_intervals(5 + values[:, None], 0.95)[0]

    assert (low, high) == pytest.approx((5 - half, 5 + half), rel=1e-5)


@pytest.mark.parametrize(
    ("freedom", "confidence", "student_t"),
    [(7, 0.95, 2.3646), (10, 0.99, 3.1693), (30, 0.95, 2.0423), (30, 0.8, 1.3104)],
)
def test_the_quantile_is_students_t_from_the_tables(
    freedom: int, confidence: float, student_t: float
) -> None:
    """Printed tables of Student's t; widened for the variance that divides by N."""
    assert student_quantile(confidence, freedom) == pytest.approx(student_t, rel=2e-4)
    widened = student_t * math.sqrt((freedom + 1) / freedom)
    assert widened_quantile(confidence, freedom + 1) == pytest.approx(widened, rel=2e-4)


def test_columns_do_not_know_of_each_other() -> None:
    """Each is what it would be alone, whatever its scale and place."""
    values = np.random.default_rng(0).lognormal(size=(20, 3))

    together = mean_intervals(values, 0.95)

    for column in range(3):
        alone = mean_intervals(values[:, column : column + 1], 0.95)
        np.testing.assert_allclose(together[column], alone[0], rtol=1e-12)
    moved = mean_intervals(7 + 1e-3 * values, 0.95)
    np.testing.assert_allclose(moved, 7 + 1e-3 * together, rtol=1e-9)


def test_equal_values_have_an_interval_of_one_point() -> None:
    """Also for one window, and where a sum would round: 0.1 has no exact mean."""
    assert mean_intervals(np.full((9, 1), 0.1), 0.95).tolist() == [[0.1, 0.1]]
    assert mean_intervals(np.full((1, 1), 0.7), 0.95).tolist() == [[0.7, 0.7]]


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("confidence", [0.51, 0.95, 0.999999])
@pytest.mark.parametrize("outlier", [-1e9, 1e9])
def test_extreme_values_have_finite_bounds_around_the_mean(
    count: int, confidence: float, outlier: float
) -> None:
    """One window that dwarfs the others is the worst case of the correction."""
    values = np.array([outlier, *np.linspace(0, 1, count - 1)])[:, None]

    low, high = mean_intervals(values, confidence)[0]

    assert np.isfinite([low, high]).all()
    assert low < values.mean() < high


def test_a_mean_is_within_its_interval_and_more_confidence_widens_it() -> None:
    """Nested intervals around the measured value, the long tail's side further out."""
    values = np.random.default_rng(5).lognormal(0, 0.5, (40, 1))

    narrow, wide = (mean_intervals(values, confidence)[0] for confidence in (0.8, 0.99))

    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    assert wide[1] - values.mean() > values.mean() - wide[0]


def test_more_skewness_never_brings_the_bound_of_the_long_tail_nearer() -> None:
    """In standard errors: past the crest of the correction it stays."""
    reaches = []
    for outlier in (1.5, 2.0, 4.0, 8.0, 100.0):
        values = np.array([*np.linspace(-1, 1, 11), outlier])
        _, high = mean_intervals(values[:, None], 0.95)[0]
        reaches.append((high - values.mean()) / values.std())

    assert np.diff(reaches).min() > -1e-9


@pytest.mark.parametrize(
    ("name", "count"),
    [("normal", 8), ("normal", 32), ("skewed", 8), ("heavy", 16), ("agreement", 32)],
)
def test_each_bound_is_wrong_about_as_rarely_as_it_says(name: str, count: int) -> None:
    """20,000 simulated evaluations at a confidence of 0.95: 2.5 % a side, never 5 %.

    `skewed` and `heavy` are log-normal, sigma 0.5 and 1; `agreement` is a share of 511 positions
    whose probability differs between windows.
    """
    rng = np.random.default_rng(11)
    shape = (count, 20_000)
    values, truth = {
        "normal": lambda: (rng.normal(1, 1, shape), 1.0),
        "skewed": lambda: (rng.lognormal(0, 0.5, shape), math.exp(0.125)),
        "heavy": lambda: (rng.lognormal(0, 1, shape), math.exp(0.5)),
        "agreement": lambda: (rng.binomial(511, rng.beta(90, 10, shape)) / 511, 0.9),
    }[name]()

    low, high = mean_intervals(values, 0.95).T

    assert np.mean(high < truth) < 0.045
    assert np.mean(low > truth) < 0.03
    assert np.mean((high < truth) | (low > truth)) > 0.015
