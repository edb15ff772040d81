"""Logits of both models to numbers of windows, as they come from the workers (docs/gate.md).

Letters of shapes: N windows, T tokens of a window, V entries of the vocabulary, R ranges of
positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from quantkit.errors import CalibrationError
from quantkit.judging.worker import Pair, Worker
from quantkit.numerics.divergence import TokenMetrics, compare_logits
from quantkit.records import TokenWindows

BATCH_TOKENS: Mapping[str, int] = MappingProxyType({"cpu": 1024, "cuda": 4096})
"""Tokens of one request, at the most (at least one window)."""
BATCH_FLOATS = 1 << 25
"""Logits of one request, at the most: 128 MiB on disk (at least one window)."""
COMPARE_FLOATS = 1 << 17
"""Logits that are compared at a time: what float64 copies of them take stays in the cache."""

FIRST_RANGE = 16
"""Positions of the first range; each later one has as many as all before it."""
SHOWN_TOKENS = 3
"""Most probable tokens that are kept where the models part most."""

_MEANS = ("baseline_nll", "candidate_nll", "kl", "agree")
"""What a part of a window has: whole windows, ranges of positions and domains."""


@dataclass(frozen=True)
class Means:
    """Over some positions of a window. nll and KL in nats; `tokens` is how many positions."""

    tokens: int
    baseline_nll: float
    candidate_nll: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class WorstPosition:
    """The counted position of a window with the largest KL.

    Tokens are ids, the most probable first; probabilities theirs by the model that holds them.
    """

    position: int
    kl: float
    baseline: tuple[int, ...]
    baseline_probabilities: tuple[float, ...]
    candidate: tuple[int, ...]
    candidate_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class WindowScore:
    """What is kept of one window: a few numbers, and 4 bytes for each of its counted positions.

    The divergences stay, since a percentile over all positions needs them: 2 KB for a window of
    512 tokens.
    """

    whole: Means
    reverse_kl: float
    top5_agreement: float
    lost: float
    won: float
    ranges: tuple[Means | None, ...]
    """[R]; None where no position of a range counts."""
    domains: Mapping[int, Means]
    """Index of a domain that the window has -> over its positions."""
    worst: WorstPosition
    kl_each: np.ndarray
    """float32, at each counted position."""


def find_ranges(positions: int) -> tuple[tuple[int, int], ...]:
    """Return ranges [start, stop) in powers of two that cover `positions`: 0-16, 16-32, 32-64, ...

    The last one goes to the end; what would be less than half of a range belongs to the one before.
    """
    starts = [0]
    start = FIRST_RANGE
    while start + start // 2 <= positions:
        starts.append(start)
        start *= 2
    return tuple(zip(starts, [*starts[1:], positions], strict=True))


def select_scored(windows: TokenWindows) -> TokenWindows:
    """Return the windows in which a token counts, with their numbers in the data.

    Raises:
        CalibrationError: there is none.
    """
    kept = (windows.weights[:, 1:] != 0).any(axis=1)
    if not kept.any():
        raise CalibrationError(f"{windows.source}: none of the evaluation tokens counts")
    numbers = np.arange(len(windows.ids)) if windows.numbers is None else windows.numbers
    return replace(
        windows,
        ids=windows.ids[kept],
        weights=windows.weights[kept],
        domains=None if windows.domains is None else windows.domains[kept],
        numbers=numbers[kept],
    )


def plan_batches(windows: range, length: int, *, vocabulary: int, device: str) -> list[range]:
    """Cut `windows` of `length` tokens into what is asked for at once."""
    tokens = BATCH_TOKENS.get(device, BATCH_TOKENS["cpu"])
    size = max(1, min(tokens // length, BATCH_FLOATS // (length * vocabulary)))
    return [windows[start : start + size] for start in range(0, len(windows), size)]


@contextmanager
def leaving_cores_to_workers(device: str) -> Iterator[None]:
    """Compare on one thread where the workers compute on this CPU: more would spin and wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def score_windows(
    pair: Pair, windows: TokenWindows, batches: Sequence[range], vocabulary: int, folder: Path
) -> Iterator[tuple[list[WindowScore], bool]]:
    """Yield each batch's scores and whether its logits were finite.

    While this process compares a batch, the workers compute the next one; files are deleted when
    they were compared, so that two batches lie on the disk at the most.

    Args:
        pair: both workers, with their models loaded.
        windows: as `select_scored` returns them.
        batches: which windows to ask for at once, at least one.
        vocabulary: V.
        folder: for the files of logits.

    Raises:
        WorkerError, ResourceError: as `Pair.answers`; or an answer is not what was asked for.
    """
    length = windows.ids.shape[1]

    def request(number: int) -> list[Path]:
        files = [folder / f"{worker.role}-{number}.f32" for worker in pair.workers]
        rows = windows.ids[batches[number].start : batches[number].stop].tolist()
        asked = [{"op": "logits", "ids": rows, "file": str(file)} for file in files]
        pair.ask(asked[0], asked[1])
        return files

    files = request(0)
    for number, batch in enumerate(batches):
        answers = pair.answers()
        shape = (len(batch), length, vocabulary)
        for worker, answer, file in zip(pair.workers, answers, files, strict=True):
            check_logits(worker, answer, file, shape)
        following = request(number + 1) if number + 1 < len(batches) else []
        scores = [
            _score_window(files, row, windows, window, vocabulary)
            for row, window in enumerate(batch)
        ]
        for file in files:
            file.unlink()
        files = following
        yield scores, all(answer.get("finite") is True for answer in answers)


def check_logits(
    worker: Worker, answer: Mapping[str, Any], file: Path, shape: tuple[int, ...]
) -> None:
    """Refuse an answer whose shape, or whose file's size, is not what was asked for.

    Raises:
        WorkerError: it is not.
    """
    size = file.stat().st_size if file.is_file() else 0
    if answer.get("shape") != list(shape) or size != 4 * int(np.prod(shape)):
        raise worker.error(
            f"answered logits of shape {answer.get('shape')} in {size} bytes for {list(shape)}"
        )


def _score_window(
    files: Sequence[Path], row: int, windows: TokenWindows, window: int, vocabulary: int
) -> WindowScore:
    """Compare row `row` of two logits files, a few positions at a time."""
    ids = windows.ids[window]
    length = len(ids)
    targets = torch.from_numpy(ids[1:])
    step = max(1, COMPARE_FLOATS // vocabulary)
    parts = []
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        first = (row * length + start) * vocabulary
        pair = [_read_floats(file, first, (stop - start) * vocabulary) for file in files]
        logits = [floats.reshape(-1, vocabulary) for floats in pair]
        parts.append(compare_logits(logits[0], logits[1], targets[start:stop]))
    domains = None if windows.domains is None else windows.domains[window, 1:]
    return summarize_window(parts, windows.weights[window, 1:] != 0, domains)


def _read_floats(file: Path, first: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(file, dtype=np.float32, count=count, offset=4 * first))


def summarize_window(
    parts: Sequence[TokenMetrics], counted: np.ndarray, domains: np.ndarray | None
) -> WindowScore:
    """Put the positions of one window together.

    Args:
        parts: its positions, a few after the other.
        counted: bool [T-1], at least one of them true.
        domains: [T-1], of the tokens that are predicted; None: not asked for.
    """
    columns = {
        name: torch.cat([getattr(part, name) for part in parts]).double().numpy()
        for name in (*_MEANS, "reverse_kl", "top5_agreement", "lost", "won")
    }
    whole = _average(columns, counted)
    assert whole is not None
    places = np.arange(len(counted))
    present = [] if domains is None else np.unique(domains[counted]).tolist()
    shares = {number: _average(columns, counted & (domains == number)) for number in present}
    return WindowScore(
        whole=whole,
        reverse_kl=float(columns["reverse_kl"][counted].mean()),
        top5_agreement=float(columns["top5_agreement"][counted].mean()),
        lost=float(columns["lost"][counted].mean()),
        won=float(columns["won"][counted].mean()),
        ranges=tuple(
            _average(columns, counted & (start <= places) & (places < stop))
            for start, stop in find_ranges(len(counted))
        ),
        domains={number: means for number, means in shares.items() if means is not None},
        worst=_find_worst(parts, columns["kl"], counted),
        kl_each=columns["kl"][counted].astype(np.float32),
    )


def _average(columns: Mapping[str, np.ndarray], chosen: np.ndarray) -> Means | None:
    """Average over the positions where `chosen`; None where it is nowhere true."""
    tokens = int(chosen.sum())
    if not tokens:
        return None
    baseline_nll, candidate_nll, kl, agreement = (
        float(columns[name][chosen].mean()) for name in _MEANS
    )
    return Means(tokens, baseline_nll, candidate_nll, kl, agreement)


def _find_worst(
    parts: Sequence[TokenMetrics], kl: np.ndarray, counted: np.ndarray
) -> WorstPosition:
    places = np.flatnonzero(counted)
    position = int(places[np.argmax(kl[places])])
    tops = [
        torch.cat([getattr(part, name) for part in parts])[position, :SHOWN_TOKENS]
        for name in ("baseline_top", "baseline_top_log_p", "candidate_top", "candidate_top_log_p")
    ]
    return WorstPosition(
        position=position,
        kl=float(kl[position]),
        baseline=tuple(tops[0].tolist()),
        baseline_probabilities=tuple(tops[1].exp().tolist()),
        candidate=tuple(tops[2].tolist()),
        candidate_probabilities=tuple(tops[3].exp().tolist()),
    )
