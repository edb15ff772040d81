"""Which artifacts are told apart: paired, over the windows that both have, all pairs at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from quantkit.judging.differences import find_differences
from quantkit.judging.statistics import mean_intervals
from quantkit.records import Details, Judgement, Metric

NOTHING = Metric(0.0, 0.0, 0.0)


def judged(kl: Sequence[float], windows: Sequence[int] | None = None) -> Judgement:
    """A judgement of an artifact with these divergences in these windows."""
    details = Details(
        NOTHING, NOTHING, NOTHING, 0.0, windows=tuple(windows or range(len(kl))), kl=tuple(kl)
    )
    return Judgement("PASS", (), (), None, None, None, 0.95, len(kl), details=details)


def test_a_small_difference_shows_where_windows_are_paired() -> None:
    """Windows differ much more from each other than the artifacts do."""
    draw = np.random.default_rng(0)
    hard = draw.lognormal(-4, 1, 64)
    noise = draw.normal(0, 1e-4, 64)

    (found,) = find_differences({"a": judged(hard), "b": judged(hard + 5e-4 + noise)})

    assert (found.first, found.second, found.windows) == ("a", "b", 64)
    assert found.significant
    assert found.kl.value == pytest.approx(-5e-4, rel=0.1)
    assert found.kl.low < found.kl.value < found.kl.high < 0


def test_only_windows_that_both_have_count() -> None:
    """By their numbers, in whatever order they were measured."""
    draw = np.random.default_rng(1)
    kl = draw.lognormal(-4, 1, 32)
    order = draw.permutation(20).tolist()

    (found,) = find_differences({"a": judged(kl), "b": judged(kl[order] + 0.01, order)})

    assert found.windows == 20
    assert found.kl.value == pytest.approx(-0.01)


def test_the_error_of_all_pairs_is_shared_out() -> None:
    """Three artifacts make three pairs, each at 1 - 0.05 / 3; an interval is the wider of two."""
    draw = np.random.default_rng(2)
    a, b, c = draw.lognormal(-4, 1, (3, 40))

    found = find_differences({"a": judged(a), "b": judged(b), "c": judged(c)})

    assert [(each.first, each.second) for each in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    differences = a - c
    ((low, high),) = mean_intervals(differences[:, None], 1 - 0.05 / 3)
    # Student's, with the quantile from a table: 2.5017 for 0.05 / 6 and 39 degrees of freedom.
    reach = 2.5017 * differences.std(ddof=1) / 40**0.5
    low, high = min(low, differences.mean() - reach), max(high, differences.mean() + reach)
    assert (found[1].kl.low, found[1].kl.high) == pytest.approx((low, high), rel=0.01)


def test_copies_and_few_windows_are_not_told_apart() -> None:
    """Equal numbers have no difference, and seven windows prove nothing."""
    kl = np.linspace(0.01, 0.02, 8)

    (same,) = find_differences({"a": judged(kl), "b": judged(kl)})
    (few,) = find_differences({"a": judged(kl[:7]), "b": judged(kl[:7] + 1)})

    assert (same.significant, same.kl.value) == (False, 0.0)
    assert (few.significant, few.windows, few.kl.value) == (False, 7, pytest.approx(-1))


def test_what_was_not_measured_is_left_out() -> None:
    """An encoder, an artifact that failed, and one without a window in common."""
    failed = Judgement("FAIL", (), ("it died",), None, None, None, 0.95, 0)
    kl = np.linspace(0.01, 0.02, 8)

    assert find_differences({}) == ()
    assert find_differences({"a": judged(kl), "b": failed}) == ()
    assert find_differences({"a": judged(kl), "b": judged(kl, range(8, 16))}) == ()


@pytest.mark.parametrize("shape", ["alike", "skewed"])
def test_equal_artifacts_are_rarely_told_apart(shape: str) -> None:
    """In one comparison of four in twenty at the most, by the confidence of 0.95."""
    draw = np.random.default_rng(3)
    wrong = 0
    for _ in range(300):
        hard = draw.lognormal(-4, 0.5, 32)
        rows = {name: hard * draw.lognormal(0, 0.3, 32) for name in "abcd"}
        if shape == "skewed":
            # The same mean over all windows, with a long tail in every second artifact.
            rows |= {name: hard * draw.lognormal(0.045 - 0.18, 0.6, 32) for name in "bd"}
        judgements = {name: judged(row.tolist()) for name, row in rows.items()}
        wrong += any(each.significant for each in find_differences(judgements))
    # 15 are expected at the most, with a standard deviation of 3.8.
    assert wrong < 26
