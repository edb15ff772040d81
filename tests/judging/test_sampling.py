"""Tests of quantkit.judging.sampling."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.judging.needing import estimate_windows
from quantkit.judging.sampling import (
    explain_windows,
    find_look_confidence,
    plan_looks,
    shuffle_windows,
)
from quantkit.records import Check, TokenWindows


def make_check(value: float, low: float, high: float, limit: float, name: str = "max_kl") -> Check:
    """An inconclusive check."""
    return Check(name, limit, value, low, high, "INCONCLUSIVE")


def test_windows_are_shuffled_with_their_weights_and_alike_for_a_seed() -> None:
    """Each comes once, and the seed alone decides where."""
    ids = np.arange(40).reshape(20, 2)
    windows = TokenWindows(ids, ids.astype(np.float32), "test", "0" * 64)

    first, again, other = (shuffle_windows(windows, seed) for seed in (0, 0, 1))

    np.testing.assert_array_equal(first.ids, again.ids)
    assert not np.array_equal(first.ids, other.ids)
    assert not np.array_equal(first.ids, ids)
    np.testing.assert_array_equal(np.sort(first.ids[:, 0]), ids[:, 0])
    np.testing.assert_array_equal(first.ids, first.weights)
    assert first.source == "test"


def test_a_shuffled_window_keeps_its_number_and_its_domains() -> None:
    """Shuffled twice as well: the numbers are those in the data."""
    ids = np.arange(40).reshape(20, 2)
    windows = TokenWindows(
        ids, ids.astype(np.float32), "test", "0" * 64, domains=ids.astype(np.int16)
    )

    once = shuffle_windows(windows, 3)
    twice = shuffle_windows(once, 4)

    for shuffled in (once, twice):
        assert shuffled.numbers is not None
        np.testing.assert_array_equal(shuffled.numbers, shuffled.ids[:, 0] // 2)
        np.testing.assert_array_equal(shuffled.domains, shuffled.ids)


@pytest.mark.parametrize(
    ("samples", "available", "looks"),
    [
        (128, 50, (50,)),
        (128, 128, (128,)),
        (128, 191, (128,)),
        (128, 192, (128, 192)),
        (128, 256, (128, 256)),
        (128, 277, (128, 277)),
        (128, 384, (128, 256, 384)),
        (128, 512, (128, 256, 512)),
        (16, 100, (16, 32, 64, 100)),
        (2, 40, (8, 16, 40)),
        (4, 4, (4,)),
        (1, 1, (1,)),
    ],
)
def test_looks_double_up_to_what_there_is(
    samples: int, available: int, looks: tuple[int, ...]
) -> None:
    """None before eight windows, and none that would add next to nothing."""
    assert plan_looks(samples, available) == looks


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99, 0.9999])
@pytest.mark.parametrize("looks", [1, 2, 3, 5, 10])
def test_the_looks_share_the_error_that_one_look_may_make(confidence: float, looks: int) -> None:
    """Never more in sum, and hardly less; one look is as sure as it ever was."""
    each = find_look_confidence(confidence, looks)

    assert 0.98 * (1 - confidence) < looks * (1 - each) <= (1 - confidence) * (1 + 1e-9)
    assert find_look_confidence(confidence, 1) == confidence


def test_confidences_are_numbers_to_print() -> None:
    """Three digits of the error."""
    assert [find_look_confidence(0.95, looks) for looks in (2, 3, 4)] == [0.975, 0.9834, 0.9875]


def test_windows_are_estimated_by_the_square_of_what_the_interval_must_narrow() -> None:
    """The check that needs most counts; others are done."""
    half = make_check(0.04, 0.02, 0.06, 0.05)
    below = make_check(0.89, 0.86, 0.93, 0.90, "min_top1_agreement")
    done = Check("max_kl", 0.05, 0.01, 0.009, 0.011, "PASS")

    assert estimate_windows([half, done], 32) == 128
    assert estimate_windows([half, below], 32) == 32 * 16
    assert estimate_windows([make_check(0.04, 0.03, 0.0500001, 0.05)], 32) == 33


def test_a_value_on_its_limit_is_not_given_a_number() -> None:
    """Fifty times the windows and more is no advice."""
    assert estimate_windows([make_check(0.05, 0.04, 0.06, 0.05)], 32) is None
    assert estimate_windows([make_check(0.0491, 0.04, 0.06, 0.05)], 32) is None
    assert estimate_windows([make_check(0.05, 0.05, 0.05, 0.05)], 32) is None
    assert estimate_windows([make_check(float("nan"), 0.04, 0.06, 0.05)], 32) is None
    words = explain_windows(None, 32, available=32, limit=128)
    assert words == "a value lies on its limit: more evaluation windows will hardly decide"


def test_the_words_say_what_is_lacking() -> None:
    """Text where it has ended, else the key."""
    assert explain_windows(90, 50, available=50, limit=512) == (
        "50 evaluation windows do not decide: at least 40 more are needed, by their spread "
        "(90 in all), and the evaluation data holds 50: give more text"
    )
    assert explain_windows(900, 512, available=512, limit=512).endswith(
        "388 more are needed, by their spread (900 in all), and gate.max_samples allows 512: "
        "raise it"
    )
