"""Logits of both models for a few rows of token ids, reduced to what the probes look at.

Letters of shapes: B rows, L tokens of a row, V entries of the vocabulary, S watched tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.judging.scoring import BATCH_FLOATS, check_logits
from quantkit.judging.worker import Pair
from quantkit.numerics.divergence import quick_divergence

CHUNK_FLOATS = 1 << 20
"""Logits that are compared at a time."""


@dataclass(frozen=True)
class Compared:
    """What rows of tokens gave.

    kl: float32 [B, L], KL(baseline || artifact) in nats, to about one part in a thousand. baseline,
    artifact: float32 [B, L, S], log-probabilities of the watched tokens as the next one. nll:
    float32 [B, L - 1], the baseline's, of the token that came next.
    """

    kl: np.ndarray
    baseline: np.ndarray
    artifact: np.ndarray
    nll: np.ndarray


def compare_rows(
    pair: Pair, rows: np.ndarray, watched: Sequence[int], vocabulary: int, folder: Path
) -> Compared:
    """Let both models read `rows` and compare them at every position.

    Args:
        pair: both workers, loaded and idle.
        rows: int64 [B, L], B at least 1.
        watched: token ids below `vocabulary`, S of them.
        vocabulary: V.
        folder: for files of logits: of each model up to 128 MiB at a time, or those of one row.

    Raises:
        WorkerError, ResourceError: as `Pair.answers`; or an answer is not what was asked for.
    """
    step = max(1, BATCH_FLOATS // (rows.shape[1] * vocabulary))
    parts = [
        _compare_batch(pair, rows[start : start + step], watched, vocabulary, folder)
        for start in range(0, len(rows), step)
    ]
    kl, baseline, artifact, nll = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("kl", "baseline", "artifact", "nll")
    )
    return Compared(kl, baseline, artifact, nll)


def _compare_batch(
    pair: Pair, rows: np.ndarray, watched: Sequence[int], vocabulary: int, folder: Path
) -> Compared:
    files = [folder / f"{worker.role}-probe.f32" for worker in pair.workers]
    asked = [{"op": "logits", "ids": rows.tolist(), "file": str(file)} for file in files]
    pair.ask(asked[0], asked[1])
    shape = (*rows.shape, vocabulary)
    for worker, answer, file in zip(pair.workers, pair.answers(), files, strict=True):
        check_logits(worker, answer, file, shape)
    chosen = torch.tensor(list(watched), dtype=torch.int64)
    # Behind the last token of a row comes the first of the next one, which is cut off again.
    following = torch.from_numpy(np.roll(rows.reshape(-1), -1))
    step = max(1, CHUNK_FLOATS // vocabulary)
    kl: list[Tensor] = []
    nll: list[Tensor] = []
    logs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, rows.size, step):
        count = min(step, rows.size - start)
        first, second = (_read_logits(file, start, count, vocabulary) for file in files)
        log_p = torch.log_softmax(first, dim=-1)
        targets = following[start : start + count].unsqueeze(-1)
        nll.append(-log_p.gather(-1, targets).squeeze(-1))
        kl.append(quick_divergence(log_p, second))
        for log, logits in zip(logs, (first, second), strict=True):
            log.append(logits[:, chosen] - torch.logsumexp(logits, dim=-1, keepdim=True))
    for file in files:
        file.unlink()
    baseline, artifact = (torch.cat(log).reshape(*rows.shape, len(watched)).numpy() for log in logs)
    whole_kl, whole_nll = (torch.cat(part).reshape(rows.shape).numpy() for part in (kl, nll))
    return Compared(whole_kl, baseline, artifact, whole_nll[:, :-1])


def _read_logits(file: Path, start: int, count: int, vocabulary: int) -> Tensor:
    """Read positions `start` to `start` + `count` - 1 of a file, all rows end to end."""
    floats = np.fromfile(
        file, dtype=np.float32, count=count * vocabulary, offset=4 * start * vocabulary
    )
    return torch.from_numpy(floats).reshape(count, vocabulary)
