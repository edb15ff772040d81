"""Ranges against brute force over the values themselves, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.numerics.ranges import LEVELS, find_range

METHODS = ("minmax", "percentile", "mse", "entropy")


def _histogram(values: np.ndarray, bins: int = 2048) -> tuple[np.ndarray, float, float]:
    counts, edges = np.histogram(values, bins)
    return counts, float(edges[0]), float(edges[-1])


def _squared_error(values: np.ndarray, weights: np.ndarray, low: float, high: float) -> float:
    """Round the values to 8 bits in a range and give the mean squared error."""
    step = (high - low) / (LEVELS - 1)
    zero = round(-low / step)
    codes = np.clip(np.round(values / step) + zero, 0, LEVELS - 1) - zero
    return float(np.average((codes * step - values) ** 2, weights=weights))


def _heavy_tails(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.normal(size=60_000), generator.normal(size=40) * 12])


@pytest.mark.parametrize("shift", [-1.5, 0.0, 2.0])
def test_mse_is_near_the_best_of_all_ranges(shift: float) -> None:
    """Within five percent of the best of 40 x 40 ranges, measured on the values."""
    generator = np.random.default_rng(3)
    values = np.concatenate([generator.normal(size=5000), generator.normal(size=20) * 6]) + shift
    weights = np.repeat([1000.0, 1.0], [5000, 20])
    counts, edges = np.histogram(values, 2048, weights=weights)
    low, high = float(edges[0]), float(edges[-1])
    found = find_range(counts, low, high, "mse")

    shares = np.geomspace(1.0, 1 / 10, 40)
    errors = [_squared_error(values, weights, low * a, high * b) for a in shares for b in shares]
    assert _squared_error(values, weights, *found) < 1.05 * min(errors)
    assert min(errors) < 0.6 * errors[0]


def test_percentile_cuts_half_of_the_tail_at_either_end() -> None:
    counts = np.full(1000, 3)
    low, high = find_range(counts, -5.0, 5.0, "percentile", 90.0)
    assert (low, high) == pytest.approx((-4.5, 4.5))
    assert find_range(counts, -5.0, 5.0, "percentile", 100.0) == (-5.0, 5.0)


def test_percentile_agrees_with_numpy() -> None:
    values = _heavy_tails()
    found = find_range(*_histogram(values, 20_000), "percentile", 99.9)
    assert found == pytest.approx(np.percentile(values, [0.05, 99.95]), abs=0.02)


def test_entropy_cuts_a_long_tail_off() -> None:
    values = _heavy_tails()
    counts, low, high = _histogram(values)
    found = find_range(counts, low, high, "entropy")
    assert low / 1.2 < found[0] < -3
    assert 3 < found[1] < high / 1.2


def test_entropy_of_few_bins_keeps_the_whole_range() -> None:
    """As many codes as bins lose nothing."""
    assert find_range(np.ones(100), -1.0, 3.0, "entropy") == (-1.0, 3.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ends", [(2.0, 5.0), (-5.0, -2.0), (-1.0, 4.0)])
def test_zero_lies_in_every_range_and_nothing_is_added(
    method: str, ends: tuple[float, float]
) -> None:
    low, high = find_range(np.arange(1, 301), *ends, method, 99.0)
    assert min(ends[0], 0.0) <= low <= 0.0 <= high <= max(ends[1], 0.0)
    assert high > low


@pytest.mark.parametrize("method", METHODS)
def test_a_single_value_has_the_range_up_to_zero(method: str) -> None:
    assert find_range(np.array([7, 0]), 3.0, 3.0, method) == (0.0, 3.0)
    assert find_range(np.array([7]), 0.0, 0.0, method) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("counts", "ends", "method", "words"),
    [
        (np.ones(4), (0.0, float("nan")), "mse", "no range"),
        (np.ones(4), (1.0, 0.0), "mse", "no range"),
        (np.zeros(4), (0.0, 1.0), "mse", "without values"),
        (np.array([1.0, float("nan")]), (0.0, 1.0), "mse", "without values"),
        (np.ones(4), (0.0, 1.0), "best", "range method 'best'"),
    ],
)
def test_what_is_no_histogram_is_refused(
    counts: np.ndarray, ends: tuple[float, float], method: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        find_range(counts, *ends, method)
