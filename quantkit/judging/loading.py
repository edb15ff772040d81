"""Both models loaded: what their workers say of them, and whether they can be compared at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from quantkit.errors import ArtifactError, CalibrationError
from quantkit.judging.suspicions import compare_unexpected
from quantkit.judging.worker import Pair, worker_threads

_MOST_TOKENS = 1 << 31
"""Of a vocabulary, or of a sequence."""
_MOST_SECONDS = 1e7


@dataclass(frozen=True)
class Setup:
    """What both workers said when they had loaded."""

    baseline: Path
    runtime: str
    vocabulary: int
    device: str
    versions: dict[str, str]
    suspicions: tuple[str, ...]
    load_seconds: float | None
    """The candidate's; None where the worker did not say."""
    positions: int | None
    """Tokens of a sequence that both take at the most; None where neither says."""
    notes: tuple[str, ...]


def load_models(pair: Pair, baseline: Path, candidate: Path, device: str, runtime: str) -> Setup:
    """Let both workers load their model.

    Args:
        pair: the workers, which have not been asked for anything.
        baseline: folder of the checkpoint.
        candidate: folder or file of the artifact.
        device: `auto`, `cpu` or `cuda`.
        runtime: what the candidate runs in.

    Raises:
        ArtifactError: the two have different vocabularies.
        WorkerError, ResourceError, MissingPackageError: as `Pair.answers`.
    """
    common = {"op": "load", "device": device, "threads": worker_threads()}
    pair.ask(
        common | {"path": str(baseline.resolve())}, common | {"path": str(candidate.resolve())}
    )
    first, second = pair.answers()
    for worker, answer in zip(pair.workers, (first, second), strict=True):
        if not (_is_size(answer.get("vocab")) and isinstance(answer.get("versions"), dict)):
            raise worker.error("answered without the size of its vocabulary or its versions")
    if first["vocab"] != second["vocab"]:
        raise ArtifactError(
            f"{candidate} has a vocabulary of {second['vocab']} tokens and its baseline {baseline}"
            f" one of {first['vocab']}: a different model or tokenizer"
        )
    # The baseline's runtime may be another one, with packages of its own.
    versions = {
        str(name): str(value) for name, value in (first["versions"] | second["versions"]).items()
    }
    for name in ("dtype", "device"):
        values = [str(answer.get(name)) for answer in (first, second)]
        versions[name] = values[1] if values[0] == values[1] else f"{values[1]} against {values[0]}"
    if isinstance(second.get("kv_cache"), str):
        versions["kv_cache"] = second["kv_cache"]
    positions, notes = _find_positions(first.get("positions"), second.get("positions"), runtime)
    return Setup(
        baseline=baseline,
        runtime=runtime,
        vocabulary=first["vocab"],
        device=str(second.get("device")),
        versions=versions,
        suspicions=compare_unexpected(first.get("unexpected", []), second.get("unexpected", [])),
        load_seconds=_read_seconds(second.get("load_seconds")),
        positions=positions,
        notes=notes,
    )


def _find_positions(
    baseline: object, candidate: object, runtime: str
) -> tuple[int | None, tuple[str, ...]]:
    """Return the longest sequence that both workers take, and a note where the candidate's is the
    shorter one."""
    mine, theirs = (each if _is_size(each) else None for each in (baseline, candidate))
    if mine is None or theirs is None:
        return theirs if mine is None else mine, ()
    if theirs >= mine:
        return mine, ()
    note = (
        f"the artifact takes sequences of up to {theirs} tokens in {runtime}, and its baseline of "
        f"up to {mine}: what is longer was not looked at"
    )
    return theirs, (note,)


def _is_size(value: object) -> TypeGuard[int]:
    """Whether a worker told a number of tokens that a model can have."""
    return type(value) is int and 0 < value < _MOST_TOKENS


def _read_seconds(told: object) -> float | None:
    # An integer may have thousands of digits.
    is_time = isinstance(told, int | float) and 0 <= told < _MOST_SECONDS
    return float(told) if is_time and isinstance(told, int | float) else None


def check_ids(ids: np.ndarray, vocabulary: int) -> None:
    """Refuse windows that the models have no embeddings for.

    Args:
        ids: int64 [N, T].
        vocabulary: tokens of both models.

    Raises:
        CalibrationError: an id is not among them.
    """
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        raise CalibrationError(
            f"an evaluation window holds token {int(ids.max())}, but the models have {vocabulary}"
            " tokens: the windows were made with another tokenizer"
        )
