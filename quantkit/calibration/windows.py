"""Cutting ids into windows of equal length: no padding, no overlap.

Letters of shapes: N windows, T tokens of a window, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from quantkit.calibration.chat import EncodedRow


@dataclass(frozen=True)
class Cut:
    """Windows that were cut: ids int64 [N, T], weights float32 [N, T], and how much there was."""

    ids: np.ndarray
    weights: np.ndarray
    row_of: np.ndarray
    """int32 [N, T], the row that each token is from; a BOS that was put in front is of the next
    token's."""
    tokens: int
    """Tokens that the data was seen to have."""
    rows: int
    """Rows that were read; 1 for a text."""
    long_rows: int
    """Rows with more tokens than a window."""
    domains: tuple[str, ...] = ("",)
    """Of each row that was read."""


def draw(count: int, seed: int) -> np.ndarray:
    """Return a permutation of 0..count-1, int64, that is the same for a seed on every machine.

    The legacy generator of numpy is frozen bit by bit (NEP 19); the new one is not.
    """
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return generator.permutation(count).astype(np.int64)


def cut_text(
    ids: np.ndarray, bos: int | None, samples: int, sequence_length: int, seed: int | None
) -> Cut:
    """Cut the ids [L] of one text: window i is [bos] + ids[i * (T-1) : (i+1) * (T-1)].

    Without `bos`, window i is ids[i * T : (i+1) * T]. Of all windows, `samples` are drawn by
    `seed`, or the first ones taken where it is None. What does not fill a window is left out.
    """
    body = sequence_length - (bos is not None)
    count = len(ids) // body
    bodies = ids[: count * body].reshape(count, body)
    chosen = np.arange(count) if seed is None else draw(count, seed)
    bodies = bodies[chosen[:samples]]
    if bos is not None:
        bodies = np.concatenate([np.full((len(bodies), 1), bos), bodies], axis=1)
    windows = np.ascontiguousarray(bodies, dtype=np.int64)
    return Cut(
        ids=windows,
        weights=np.ones(windows.shape, dtype=np.float32),
        row_of=np.zeros(windows.shape, dtype=np.int32),
        tokens=len(ids),
        rows=1,
        long_rows=0,
    )


def cut_rows(
    rows: Iterable[EncodedRow],
    bos: int | None,
    samples: int,
    sequence_length: int,
    bos_weight: float = 1.0,
) -> Cut:
    """Join rows end to end and cut the stream into at most `samples` windows.

    Reads no more rows than it needs. Where rows begin with `bos`, a window that begins inside a
    row gets one in front, with the weight `bos_weight`: models that learnt with a BOS answer
    wildly without one.
    """
    parts: list[EncodedRow] = []
    tokens = long_rows = 0
    for row in rows:
        parts.append(row)
        tokens += len(row.ids)
        long_rows += len(row.ids) > sequence_length
        if tokens >= samples * sequence_length:
            break
    stream = np.concatenate([part.ids for part in parts] or [np.empty(0, np.int64)])
    weights = np.concatenate([part.weights for part in parts] or [np.empty(0, np.float32)])
    rows_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.ids) for part in parts])
    begins_with_bos = bos is not None and any(part.ids[0] == bos for part in parts)
    window_ids: list[np.ndarray] = []
    window_weights: list[np.ndarray] = []
    window_rows: list[np.ndarray] = []
    start = 0
    while len(window_ids) < samples and start < len(stream):
        front = int(begins_with_bos and stream[start] != bos)
        end = start + sequence_length - front
        if end > len(stream):
            break
        window_ids.append(np.r_[[bos] * front, stream[start:end]])
        window_weights.append(np.r_[[bos_weight] * front, weights[start:end]])
        window_rows.append(np.r_[rows_of[start : start + front], rows_of[start:end]])
        start = end
    shape = (len(window_ids), sequence_length)
    return Cut(
        ids=np.array(window_ids, dtype=np.int64).reshape(shape),
        weights=np.array(window_weights, dtype=np.float32).reshape(shape),
        row_of=np.array(window_rows, dtype=np.int32).reshape(shape),
        tokens=tokens,
        rows=len(parts),
        long_rows=long_rows,
        domains=tuple(part.domain for part in parts),
    )


def hash_windows(ids: np.ndarray, weights: np.ndarray) -> str:
    """Return the sha256 of the shape, the ids [N, T] and the weights [N, T]."""
    digest = hashlib.sha256(f"windows {ids.shape[0]}x{ids.shape[1]}\n".encode())
    digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(weights, dtype="<f4").tobytes())
    return digest.hexdigest()
