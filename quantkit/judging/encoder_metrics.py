"""What an encoder's outputs have in common with its baseline's (docs/gate.md, "Encoders").

Everything is computed in float64. Letters of shapes: N texts, H width of an embedding, K
neighbours, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COLLAPSE = 0.1
"""Share of the baseline's spread below which embeddings count as all alike."""

_CHUNK_FLOATS = 1 << 22
"""Similarities that are held at a time."""


def unit_vectors(embeddings: np.ndarray) -> np.ndarray:
    """Return `embeddings` [N, H] divided by their lengths; a vector of zeros stays one."""
    rows = np.asarray(embeddings, dtype=np.float64)
    # The largest entry first: squares of huge or tiny numbers leave the range of floats.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    rows = rows / np.where(largest > 0, largest, 1.0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: np.ndarray = rows / np.where(lengths > 0, lengths, 1.0)
    return unit


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return [N]: the cosine of each row of `first` and `second` [N, H]; 0 for a row of zeros."""
    products: np.ndarray = (unit_vectors(first) * unit_vectors(second)).sum(axis=1)
    return products.clip(-1.0, 1.0)


def find_nearest(embeddings: np.ndarray, k: int) -> np.ndarray:
    """Return int64 [N, K]: for each row the `k` other rows of the largest cosine, in any order.

    Of equally near ones the first in the data count.
    """
    unit = unit_vectors(embeddings)
    count = len(unit)
    step = max(1, _CHUNK_FLOATS // count)
    parts = []
    for start in range(0, count, step):
        similarities = unit[start : start + step] @ unit.T
        own = np.arange(len(similarities))
        similarities[own, start + own] = -np.inf
        parts.append(np.argsort(-similarities, axis=1, kind="stable")[:, :k])
    return np.concatenate(parts)


def neighbour_overlap(first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    """Return [N]: the share of each row's `k` nearest others that `first` and `second` agree on.

    Args:
        first, second: embeddings [N, H] of the same texts.
        k: neighbours, less than N - 1: with all others every model agrees.
    """
    both = np.concatenate([find_nearest(first, k), find_nearest(second, k)], axis=1)
    both.sort(axis=1)
    # Either half holds a row once, so what follows itself is in both.
    shared: np.ndarray = (both[:, 1:] == both[:, :-1]).sum(axis=1) / k
    return shared


def distinct_rows(ids: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the numbers of the texts that none before equals, in order.

    A text that comes twice is its own nearest neighbour in every model, and which of two equal ones
    is the nearer is decided by rounding.
    """
    first = {text: number for number, text in reversed(list(enumerate(ids)))}
    return np.array(sorted(first.values()))


def mean_pairwise_cosine(embeddings: np.ndarray) -> float:
    """Return the mean cosine of all pairs of different rows; at least two rows."""
    unit = unit_vectors(embeddings)
    count = len(unit)
    # The squared length of the sum is the sum over all pairs, each row with itself included.
    own = float((unit**2).sum())
    return (float((unit.sum(axis=0) ** 2).sum()) - own) / (count * (count - 1))


def find_collapse(baseline: np.ndarray, candidate: np.ndarray) -> tuple[str, ...]:
    """Check that the artifact's embeddings [N, H] are not all alike where the baseline's differ.

    The sign is that 1 - the mean cosine between texts fell below a tenth of the baseline's.
    """
    if len(baseline) < 2:
        return ()
    before, after = mean_pairwise_cosine(baseline), mean_pairwise_cosine(candidate)
    if 1 - after >= COLLAPSE * (1 - before):
        return ()
    return (
        f"the artifact's embeddings are all alike: different texts have a mean cosine of "
        f"{after:.4f}, and {before:.4f} in the baseline",
    )


def weighted_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return [R, N]: the rank of each value when value n is there `counts[r, n]` times.

    Ranks begin at 1, and equal values share the mean of theirs.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    totals = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks_of_groups = totals.cumsum(axis=1) - (totals - 1) / 2
    group = np.cumsum(np.isin(np.arange(len(values)), starts)) - 1
    ranks = np.empty(counts.shape)
    ranks[:, order] = ranks_of_groups[:, group]
    return ranks


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return the rank correlation of two lists [N]; 0 where one of them is constant.

    Spearman, The Proof and Measurement of Association between Two Things, 1904: Pearson's
    correlation of the ranks, ties sharing the mean of theirs.
    """
    return float(resampled_spearman(first, second, np.ones((1, len(first))))[0])


def resampled_spearman(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return [R]: the rank correlation when pair n is there `counts[r, n]` times."""
    ranks = [weighted_ranks(values, counts) for values in (first, second)]
    total = counts.sum(axis=1, keepdims=True)
    a, b = (rank - (counts * rank).sum(axis=1, keepdims=True) / total for rank in ranks)
    scale = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
    product = (counts * a * b).sum(axis=1)
    found: np.ndarray = np.divide(product, scale, out=np.zeros(len(counts)), where=scale > 1e-9)
    return found


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean F1 of the classes that `labels` [N] has, each class the same."""
    return float(resampled_f1(labels, predicted, np.ones((1, len(labels))))[0])


def resampled_f1(labels: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return [R]: `macro_f1` when row n is there `counts[r, n]` times."""
    classes = np.unique(labels)
    is_label = (labels[:, None] == classes).astype(np.float64)
    is_predicted = (predicted[:, None] == classes).astype(np.float64)
    hits = counts @ (is_label * is_predicted)
    there = counts @ is_label
    both = there + counts @ is_predicted
    scores = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    found: np.ndarray = scores.sum(axis=1) / (there > 0).sum(axis=1)
    return found
