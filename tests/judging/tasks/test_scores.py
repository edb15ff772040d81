"""Recovery, its interval and McNemar's test against slow and obvious references."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from quantkit.errors import InputError
from quantkit.judging.statistics import mean_intervals
from quantkit.judging.tasks.scores import difference_interval, mcnemar, score_task
from quantkit.records import TaskResult


def score(
    baseline: list[object],
    artifact: list[object],
    kind: str = "mean",
    *,
    higher: bool = True,
    limit: float | None = None,
) -> TaskResult:
    return score_task(
        "quiz",
        "acc",
        kind,  # type: ignore[arg-type]
        (baseline, artifact),
        higher_is_better=higher,
        limit=limit,
        confidence=0.95,
    )


@pytest.mark.parametrize(
    ("lost", "won", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (3, 1, 10 / 16), (1, 3, 10 / 16), (4, 4, 1.0)],
)
def test_mcnemar_is_the_binomial_test_by_hand(lost: int, won: int, p_value: float) -> None:
    """Counted over all ways in which the changed documents could have fallen."""
    changed = lost + won
    ways = [sum(way) for way in itertools.product((0, 1), repeat=changed)]
    extreme = sum(min(way, changed - way) <= min(lost, won) for way in ways) / len(ways)

    assert mcnemar(lost, won) == pytest.approx(p_value)
    assert mcnemar(lost, won) == pytest.approx(min(1.0, extreme))


def test_mcnemar_holds_for_thousands_of_documents() -> None:
    assert mcnemar(2000, 2100) == pytest.approx(0.122, abs=0.002)


@pytest.mark.parametrize(("lost", "won", "count"), [(0, 0, 50), (3, 1, 60), (9, 2, 40), (0, 6, 30)])
def test_the_interval_of_a_difference_holds_what_a_score_test_does_not_refuse(
    lost: int, won: int, count: int
) -> None:
    """The test is done anew, with the likeliest shares found by looking at many."""
    low, high = difference_interval(lost, won, count, 0.95)

    def statistic(difference: float) -> float:
        shares = np.linspace(max(0.0, -difference), min(1.0, (1 - difference) / 2), 200_001)[1:-1]
        gains = shares + difference
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = sum(
                np.where(times > 0, times * np.log(share), 0.0)
                for times, share in (
                    (lost, shares),
                    (won, gains),
                    (count - lost - won, 1 - shares - gains),
                )
            )
        share = shares[np.nanargmax(likelihood)]
        variance = count * (2 * share + difference - difference**2)
        return float((won - lost - count * difference) / math.sqrt(variance))

    assert statistic(low) == pytest.approx(1.96, abs=0.01)
    assert statistic(high) == pytest.approx(-1.96, abs=0.01)
    assert low < (won - lost) / count < high


def test_no_change_at_all_still_proves_little_on_few_documents() -> None:
    """3.84 / (N + 3.84) of the documents may be lost, seen from N that are all the same."""
    values: list[object] = [1, 1, 1, 1, 0] * 10
    z = 1.959964**2

    result = score(values, values, limit=0.95)

    assert result.recovery == 1
    assert result.low == pytest.approx(1 - z / (50 + z) / 0.8, abs=1e-4)
    assert (result.p_value, result.lost, result.won) == (1.0, 0, 0)
    assert result.verdict == "INCONCLUSIVE"
    assert score(values * 4, values * 4, limit=0.95).verdict == "PASS"


def test_recovery_is_the_share_of_the_baselines_score() -> None:
    """Sixteen right of twenty became twelve; one that was wrong is right."""
    baseline: list[object] = [1] * 16 + [0] * 4
    artifact: list[object] = [1] * 11 + [0] * 5 + [1] + [0] * 3

    result = score(baseline, artifact, limit=0.99)

    assert (result.baseline, result.artifact, result.recovery) == (0.8, 0.6, pytest.approx(0.75))
    assert (result.lost, result.won, result.samples) == (5, 1, 20)
    low, high = difference_interval(5, 1, 20, 0.95)
    assert (result.low, result.high) == pytest.approx((1 + low / 0.8, 1 + high / 0.8))
    assert result.p_value == pytest.approx(14 / 64)


def test_where_less_is_better_recovery_is_turned_round() -> None:
    """Twice the errors are a recovery of one half."""
    result = score([1] * 5 + [0] * 15, [1] * 10 + [0] * 10, higher=False)

    assert result.recovery == pytest.approx(0.5)
    assert (result.lost, result.won) == (5, 0)
    assert result.verdict == "UNJUDGED"


def test_scores_between_right_and_wrong_have_the_interval_of_a_ratio() -> None:
    """Near the percentiles of a bootstrap of documents; McNemar's test says nothing of them."""
    draw = np.random.default_rng(0)
    baseline = draw.uniform(0.2, 1, 300)
    artifact = baseline * draw.uniform(0.7, 1.1, 300)

    result = score(list(baseline), list(artifact))

    chosen = draw.integers(0, 300, (4000, 300))
    ratios = artifact[chosen].mean(axis=1) / baseline[chosen].mean(axis=1)
    assert result.recovery == pytest.approx(artifact.mean() / baseline.mean())
    assert (result.low, result.high) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=2e-3)
    assert result.p_value is None


def test_recovery_of_a_perplexity_is_the_ratio_of_two_perplexities() -> None:
    """Of documents of one length, its interval is that of the mean difference, put through exp."""
    draw = np.random.default_rng(1)
    baseline = -draw.uniform(20, 60, 40)
    artifact = baseline - draw.uniform(0, 3, 40)

    result = score(
        [(each, 10) for each in baseline],
        [(each, 10) for each in artifact],
        "weighted_perplexity",
        higher=False,
    )
    plain = score(list(baseline / 10), list(artifact / 10), "perplexity", higher=False)

    assert result.baseline == pytest.approx(math.exp(-baseline.sum() / 400))
    assert result.recovery == pytest.approx(result.baseline / result.artifact)
    bounds = np.exp(mean_intervals((artifact - baseline)[:, None] / 10, 0.95)[0])
    assert (result.low, result.high) == pytest.approx(tuple(bounds))
    assert (plain.recovery, plain.low) == pytest.approx((result.recovery, result.low))
    assert (result.lost, result.won) == (40, 0)


def test_longer_documents_count_more_in_bits_per_byte() -> None:
    result = score([(-10.0, 10), (-60.0, 30)] * 5, [(-20.0, 10), (-60.0, 30)] * 5, "bits_per_byte",
                   higher=False)  # fmt: skip

    assert result.baseline == pytest.approx(70 / 40 / math.log(2))
    assert result.recovery == pytest.approx(70 / 80)


@pytest.mark.parametrize(
    ("lost", "limit", "verdict"),
    [(0, 0.9, "PASS"), (30, 0.9, "INCONCLUSIVE"), (80, 0.9, "FAIL"), (80, None, "UNJUDGED")],
)
def test_the_interval_decides(lost: int, limit: float | None, verdict: str) -> None:
    baseline: list[object] = [1] * 300 + [0] * 100
    artifact: list[object] = [0] * lost + [1] * (300 - lost) + [0] * 100

    assert score(baseline, artifact, limit=limit).verdict == verdict


def test_a_baseline_that_knows_nothing_proves_nothing() -> None:
    result = score([0] * 100, [0] * 99 + [1], limit=0.5)

    assert (result.recovery, result.low, result.high) == (1, 0, 1)
    assert result.verdict == "INCONCLUSIVE"


def test_fewer_than_eight_documents_decide_nothing() -> None:
    assert score([0.5] * 7, [0.5] * 7, limit=0.9).verdict == "INCONCLUSIVE"
    assert score([0.5] * 8, [0.5] * 8, limit=0.9).verdict == "PASS"


@pytest.mark.parametrize("values", [[[1, 2], [1]], ["yes", "no"], [math.nan, 1.0], [-1.0, -2.0]])
def test_values_that_have_no_share_are_refused(values: list[object]) -> None:
    with pytest.raises(InputError, match="task quiz, metric acc"):
        score(values, values)
