"""Tests of quantkit.judging.encoder_metrics, against loops and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.judging.encoder_metrics import (
    cosines,
    distinct_rows,
    find_collapse,
    find_nearest,
    macro_f1,
    mean_pairwise_cosine,
    neighbour_overlap,
    resampled_f1,
    resampled_spearman,
    spearman,
    weighted_ranks,
)


def random_vectors(count: int = 30, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def slow_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(sum(a * b) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5))


def slow_nearest(vectors: np.ndarray, k: int) -> list[set[int]]:
    found = []
    for row, vector in enumerate(vectors):
        others = [other for other in range(len(vectors)) if other != row]
        others.sort(key=lambda other: -slow_cosine(vector, vectors[other]))
        found.append(set(others[:k]))
    return found


def test_cosines_equal_the_slow_reference() -> None:
    first, second = random_vectors(), random_vectors(seed=1)

    want = [slow_cosine(a, b) for a, b in zip(first, second, strict=True)]

    np.testing.assert_allclose(cosines(first, second), want, atol=1e-12)


def test_a_cosine_does_not_depend_on_lengths_and_is_never_beyond_one() -> None:
    """Squares of tiny or huge vectors leave the range of floats; a vector of zeros has no angle."""
    first = np.array([[1e-30, 2e-30], [3e300, 4e300], [0, 0], [1, 3]])
    second = np.array([[2e-30, 4e-30], [6e300, 8e300], [1, 1], [-2, -6]])

    found = cosines(first, second)

    np.testing.assert_allclose(found, [1, 1, 0, -1], atol=1e-12)
    assert abs(found).max() <= 1


def test_neighbours_equal_the_slow_reference() -> None:
    vectors = random_vectors()

    found = find_nearest(vectors, 5)

    assert [set(row) for row in found.tolist()] == slow_nearest(vectors, 5)


def test_overlap_equals_the_slow_reference() -> None:
    first = random_vectors()
    second = first + 0.7 * random_vectors(seed=1)
    near = zip(slow_nearest(first, 4), slow_nearest(second, 4), strict=True)

    found = neighbour_overlap(first, second, 4)

    np.testing.assert_allclose(found, [len(a & b) / 4 for a, b in near])
    assert 0 < found.mean() < 1


def test_equal_models_agree_on_all_neighbours_and_reversed_ones_on_none() -> None:
    """Eight points on a quarter of a circle, their distances all different."""
    angles = 1.5 * np.linspace(0, 1, 8) ** 1.3
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)

    assert neighbour_overlap(circle, 3 * circle, 3).tolist() == [1.0] * 8
    # Along the circle now lie 0 2 4 6 1 3 5 7, so that no neighbour of a point stays one.
    mixed = circle[[0, 4, 1, 5, 2, 6, 3, 7]]
    assert neighbour_overlap(circle, mixed, 1).tolist() == [0.0] * 8


def test_neighbours_are_found_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.judging import encoder_metrics

    vectors = random_vectors()
    whole = find_nearest(vectors, 5)
    monkeypatch.setattr(encoder_metrics, "_CHUNK_FLOATS", 70)

    np.testing.assert_array_equal(find_nearest(vectors, 5), whole)


def test_equal_texts_count_once() -> None:
    assert distinct_rows([(1, 2), (3,), (1, 2), (4,), (3,)]).tolist() == [0, 1, 3]


def test_mean_pairwise_cosine_equals_the_slow_reference() -> None:
    vectors = random_vectors(9)
    pairs = [slow_cosine(vectors[i], vectors[j]) for i in range(9) for j in range(9) if i != j]

    assert mean_pairwise_cosine(vectors) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_embeddings_that_became_all_alike_are_suspicious() -> None:
    """Not those of a model whose embeddings are alike by themselves."""
    spread = random_vectors()
    alike = 100 + spread

    assert "all alike" in find_collapse(spread, alike)[0]
    assert find_collapse(alike, alike) == ()
    assert find_collapse(spread, spread + 0.3 * random_vectors(seed=1)) == ()
    assert find_collapse(spread[:1], alike[:1]) == ()


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    def rank(*values: float) -> list[float]:
        return weighted_ranks(np.array(values), np.ones((1, len(values))))[0].tolist()

    assert rank(10.0, 20.0, 20.0, 5.0) == [2, 3.5, 3.5, 1]
    assert rank(7.0, 7.0, 7.0) == [2, 2, 2]


def test_rank_correlation_of_cases_worked_out_by_hand() -> None:
    """1 - 6 sum(d^2) / (n (n^2 - 1)) without ties; with ties Pearson's of the shared ranks."""
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 9, 100])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([9.0, 7, 5, -1])) == pytest.approx(-1)
    # d = (0, 1, -1, 1, -1): 1 - 6 * 4 / 120.
    assert spearman(np.arange(5.0), np.array([0.0, 2, 1, 4, 3])) == pytest.approx(0.8)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: deviations -1.5 0 0 1.5 and -1.5 .5 -.5 1.5.
    tied = spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4]))
    assert tied == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)
    assert spearman(np.ones(4), np.arange(4.0)) == 0


def test_resampled_rank_correlations_are_those_of_the_rows_drawn() -> None:
    """Counts of rows give what the rows themselves, repeated, give."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 6, 12).astype(float), rng.normal(size=12).round(1)
    counts = np.array([np.bincount(rng.integers(0, 12, 12), minlength=12) for _ in range(40)])

    found = resampled_spearman(first, second, counts.astype(float))

    want = [spearman(np.repeat(first, row), np.repeat(second, row)) for row in counts]
    np.testing.assert_allclose(found, want, atol=1e-12)


def test_macro_f1_of_a_case_worked_out_by_hand() -> None:
    """Class 0: precision 2/3, recall 1; class 1: 1/2 and 1/2; class 2: nothing found. Class 3 is
    predicted once and no label."""
    labels = np.array([0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 0, 1])
    assert macro_f1(labels, predicted) == pytest.approx((0.8 + 0.5 + 0) / 3)

    assert macro_f1(np.array([0, 1]), np.array([0, 3])) == pytest.approx(0.5)
    assert macro_f1(np.array([4, 4]), np.array([4, 4])) == 1


def test_resampled_f1_is_that_of_the_rows_drawn() -> None:
    """A class that a draw leaves out does not count in it."""
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 12), rng.integers(0, 4, 12)
    counts = np.array([np.bincount(rng.integers(0, 12, 12), minlength=12) for _ in range(40)])

    found = resampled_f1(labels, predicted, counts.astype(float))

    want = [macro_f1(np.repeat(labels, row), np.repeat(predicted, row)) for row in counts]
    np.testing.assert_allclose(found, want, atol=1e-12)
