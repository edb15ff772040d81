"""Tests of quantkit.judging.details: what windows show besides the metrics with limits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from quantkit.judging.details import describe_details, measure_mean
from quantkit.judging.statistics import mean_intervals
from quantkit.records import EvalResult
from quantkit.records.judging import DomainScores, WindowDetails

NAN = math.nan


def make_result(windows: int = 12) -> EvalResult:
    """Windows with two ranges, the second one without a position in window 0, and two domains."""
    rng = np.random.default_rng(0)

    def draw(low: float, high: float, count: int = windows) -> tuple[float, ...]:
        return tuple(rng.uniform(low, high, count).tolist())

    details = WindowDetails(
        windows=tuple(range(100, 100 + windows)),
        reverse_kl=draw(0.01, 0.03),
        top5_agreement=draw(0.9, 1.0),
        lost=draw(0.0, 0.04),
        won=draw(0.0, 0.03),
        ranges=((0, 16), (16, 31)),
        range_kl=((0.5, NAN), *(draw(0.0, 0.1, 2) for _ in range(windows - 1))),
        range_agreement=((0.5, NAN), *(draw(0.9, 1.0, 2) for _ in range(windows - 1))),
        domains=(
            DomainScores("code", 99, draw(1, 2, 9), draw(1, 2, 9), draw(0, 0.1, 9), draw(0, 1, 9)),
            DomainScores("prose", 7, (2.0,), (2.5,), (0.3,), (0.5,)),
        ),
    )
    return EvalResult(
        runtime="transformers",
        tokens=31 * windows,
        baseline_nll=draw(2, 3),
        candidate_nll=draw(2, 3),
        kl=draw(0.01, 0.03),
        agreement=draw(0.9, 1.0),
        kl_p99=0.1,
        kl_max=0.2,
        finite=True,
        details=details,
    )


def test_means_have_the_intervals_of_means_over_windows() -> None:
    """Flips are those lost and those won, added up in each window before anything else."""
    result = make_result()
    details = result.details
    assert details is not None

    got = describe_details(result, 0.975)

    assert got is not None
    flips = np.array(details.lost) + np.array(details.won)
    for metric, values in (
        (got.reverse_kl, np.array(details.reverse_kl)),
        (got.top5_agreement, np.array(details.top5_agreement)),
        (got.flips, flips),
    ):
        low, high = mean_intervals(values[:, None], 0.975)[0]
        assert (metric.value, metric.low) == pytest.approx((sum(values) / 12, low))
        assert metric.high == pytest.approx(min(high, 1))
    assert got.lost == pytest.approx(sum(details.lost) / 12)
    assert got.lost < got.flips.value
    assert got.windows == tuple(range(100, 112))
    assert (got.baseline_nll, got.artifact_nll, got.kl) == (
        result.baseline_nll,
        result.candidate_nll,
        result.kl,
    )


def test_a_range_is_over_the_windows_that_count_a_position_of_it() -> None:
    """The window without one neither counts as zero nor spoils the mean."""
    result = make_result()
    assert result.details is not None
    table = np.array(result.details.range_kl)

    got = describe_details(result, 0.95)

    assert got is not None
    first, second = got.positions
    assert (first.start, first.stop, second.start, second.stop) == (0, 16, 16, 31)
    assert first.kl.value == pytest.approx(table[:, 0].mean())
    assert second.kl.value == pytest.approx(table[1:, 1].mean())
    assert second.kl.high == pytest.approx(mean_intervals(table[1:, 1:], 0.95)[0, 1])


def test_a_range_without_any_window_is_left_out() -> None:
    """Masked out everywhere, for instance by what the assistant did not write."""
    result = make_result()
    assert result.details is not None
    empty = replace(result.details, range_kl=((0.1, NAN),) * 12, range_agreement=((0.9, NAN),) * 12)

    got = describe_details(replace(result, details=empty), 0.95)

    assert got is not None
    assert [(each.start, each.stop) for each in got.positions] == [(0, 16)]


def test_domains_keep_their_windows_and_tokens() -> None:
    """One with a single window has an interval without width; the increase is of perplexities."""
    got = describe_details(make_result(), 0.95)

    assert got is not None
    code, prose = got.domains
    assert (code.name, code.windows, code.tokens) == ("code", 9, 99)
    assert code.kl.low < code.kl.value < code.kl.high
    assert (prose.windows, prose.tokens) == (1, 7)
    assert (prose.kl.low, prose.kl.value, prose.kl.high) == (0.3, 0.3, 0.3)
    assert prose.perplexity_increase == pytest.approx(math.exp(2.5) / math.exp(2.0) - 1)
    assert prose.top1_agreement == 0.5


def test_bounds_stay_within_what_can_be() -> None:
    """No divergence is negative and no share above one, whatever the spread says."""
    few = np.array([0.0, 0.0, 0.0, 1.0])

    got = measure_mean(few, 0.95, highest=1)

    assert (got.low, got.value, got.high) == (0.0, 0.25, 1.0)
    assert measure_mean(few, 0.95).high > 1


def test_a_result_without_details_has_none() -> None:
    """Nothing is made up."""
    assert describe_details(replace(make_result(), details=None), 0.95) is None
