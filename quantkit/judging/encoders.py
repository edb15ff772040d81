"""Run an encoder and its artifact over the same texts, each in a process of its own, and compare.

Letters of shapes: N texts, B texts of a batch, T tokens, H width of an embedding, C classes.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.encoders.data import make_batches
from quantkit.errors import ArtifactError, CalibrationError
from quantkit.formats.onnx.container import open_graph
from quantkit.judging.encoder_comparison import Outputs, compare_outputs
from quantkit.judging.worker import Pair, Worker, running_pair, worker_command, worker_threads
from quantkit.records import EncoderInfo, EncoderResult, Event, Progress, TextRows

_RUNTIMES = Path(__file__).with_name("runtimes")

ENCODER_WORKERS: Mapping[str, Path] = MappingProxyType(
    {
        "transformers": _RUNTIMES / "encoder_worker.py",
        "onnxruntime": _RUNTIMES / "onnxruntime_encoder_worker.py",
    }
)
"""Runtime -> the script of its worker for encoders."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one batch, padding included, at the most (at least one text)."""


@dataclass(frozen=True)
class _Difference:
    """Sums over all numbers of both models, and whether they are finite."""

    squares: float = 0.0
    baseline_squares: float = 0.0
    identical: bool = True
    lost_by_baseline: int = 0
    """Texts of which a number is not finite."""
    lost_by_candidate: int = 0


def evaluate_encoder(
    baseline: Path,
    candidate: Path,
    rows: TextRows,
    info: EncoderInfo,
    *,
    top_k: int = 10,
    python: str | None = None,
    baseline_python: str | None = None,
    timeout_seconds: float = 3600.0,
    device: str = "auto",
    progress: Progress | None = None,
) -> EncoderResult:
    """Measure `candidate` against `baseline` on `rows` (docs/gate.md, "Encoders").

    Args:
        baseline: folder of the original checkpoint, which runs in transformers in float32.
        candidate: the .onnx file, or the folder that holds it, which runs in ONNX Runtime.
        rows: texts as token ids, the same for both.
        info: what the model is for, and how its token vectors are pooled.
        top_k: nearest texts that retrieval compares.
        python: interpreter of the candidate's worker; None is this one.
        baseline_python: of the baseline's.
        timeout_seconds: how long a worker may be silent about one batch.
        device: `auto`, `cpu` or `cuda`. A wheel of ONNX Runtime without CUDA computes on the CPU.
        progress: called after each batch.

    Raises:
        WorkerError: a worker died, hung, answered nonsense or could not do its work.
        ResourceError: a worker ran out of memory or disk.
        ArtifactError: the graph is not there or damaged, or its outputs have other widths.
        CalibrationError: there are no texts, or labels that the model cannot be judged by.
        CheckpointError: the tokenizer of the baseline is needed, and cannot be loaded.
        InputError: the interpreter cannot be started, or a package is not there.
    """
    started = time.perf_counter()
    graph = open_graph(candidate).path
    if not rows.ids:
        raise CalibrationError(f"{rows.source}: there are no texts to judge the encoder on")
    counted = _counted_tokens(baseline, rows, info)
    tell = progress or (lambda event: None)
    tell(Event("gate", 0, len(rows.ids), "loading the baseline and the artifact"))
    with (
        tempfile.TemporaryDirectory(prefix="quantkit-gate-", ignore_cleanup_errors=True) as folder,
        running_pair(
            worker_command(baseline_python, ENCODER_WORKERS["transformers"]),
            worker_command(python, ENCODER_WORKERS["onnxruntime"]),
            timeout_seconds,
        ) as pair,
    ):
        versions = _load(pair, baseline, graph, info, device)
        tokens = BATCH_TOKENS.get(versions["device"], BATCH_TOKENS["cpu"])
        batches = list(make_batches(rows, info, tokens))
        outputs, difference = _run(pair, batches, rows, counted, Path(folder), tell)
    result = EncoderResult(
        runtime="onnxruntime",
        task=info.task,
        texts=len(rows.ids),
        finite=not (difference.lost_by_baseline or difference.lost_by_candidate),
        identical=difference.identical,
        versions=versions,
        suspicions=_not_finite(difference, len(rows.ids)),
    )
    if result.finite:
        relative = math.sqrt(difference.squares / (difference.baseline_squares or 1.0))
        result = compare_outputs(replace(result, difference=relative), outputs, rows, top_k)
    return replace(result, seconds=time.perf_counter() - started)


def load_request(path: Path, info: EncoderInfo, device: str, threads: int) -> dict[str, Any]:
    """Return the request that lets a worker load the encoder at `path`."""
    return {
        "op": "load",
        "path": str(path.resolve()),
        "device": device,
        "threads": threads,
        "task": info.task,
        "pooling": asdict(info.pooling) if info.pooling else None,
    }


def _load(
    pair: Pair, baseline: Path, graph: Path, info: EncoderInfo, device: str
) -> dict[str, str]:
    """Let both load; return versions and devices."""
    threads = worker_threads()
    pair.ask(
        load_request(baseline, info, device, threads), load_request(graph, info, device, threads)
    )
    answers = pair.answers()
    versions: dict[str, str] = {}
    for worker, answer in zip(pair.workers, answers, strict=True):
        found = answer.get("versions")
        if not isinstance(found, dict):
            raise worker.error("answered without its versions")
        versions |= {str(name): str(value) for name, value in found.items()}
    first, second = (str(answer.get("device")) for answer in answers)
    versions["device"] = second if first == second else f"{second} against {first}"
    return versions


def _counted_tokens(
    baseline: Path, rows: TextRows, info: EncoderInfo
) -> tuple[np.ndarray, ...] | None:
    """Positions of each text whose labels count: those of no special token. None: texts count."""
    if info.task != "token-classification":
        return None
    tokenizer = load_tokenizer(baseline)
    # A word that the vocabulary lacks is text all the same.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return tuple(
        np.array([place for place, token in enumerate(ids) if token not in special], dtype=int)
        for ids in rows.ids
    )


def _run(
    pair: Pair,
    batches: Sequence[tuple[list[int], dict[str, np.ndarray]]],
    rows: TextRows,
    counted: tuple[np.ndarray, ...] | None,
    folder: Path,
    tell: Progress,
) -> tuple[tuple[Outputs, Outputs], _Difference]:
    """Let both models compute all batches; put what they answer back into the data's order."""
    count = len(rows.ids)
    vectors: list[np.ndarray | None] = [None, None]
    labels: list[list[np.ndarray]] = [[np.empty(0, int)] * count for _ in pair.workers]
    difference, done = _Difference(), 0
    for numbers, outputs in _encode(pair, batches, folder):
        lengths = [len(rows.ids[number]) for number in numbers]
        difference = _add(difference, outputs, lengths)
        for which, output in enumerate(outputs):
            if output.ndim == 2 and vectors[which] is None:
                vectors[which] = np.zeros((count, output.shape[1]), np.float32)
            for place, number in enumerate(numbers):
                kept = vectors[which]
                if kept is not None:
                    kept[number] = output[place]
                    labels[which][number] = output[place].argmax(keepdims=True)
                elif counted is not None:
                    labels[which][number] = output[place][counted[number]].argmax(axis=1)
        done += len(numbers)
        tell(Event("gate", done, count, "texts"))
    first, second = (
        Outputs(kept, tuple(found)) for kept, found in zip(vectors, labels, strict=True)
    )
    return (first, second), difference


def _encode(
    pair: Pair, batches: Sequence[tuple[list[int], dict[str, np.ndarray]]], folder: Path
) -> Iterator[tuple[list[int], tuple[np.ndarray, np.ndarray]]]:
    """Yield of each batch the numbers of its texts and both models' outputs, float32 [B, ...]."""
    files = [folder / f"{worker.role}.f32" for worker in pair.workers]
    for numbers, batch in batches:
        lists = {name: array.tolist() for name, array in batch.items()}
        asked = [{"op": "encode", "batch": lists, "file": str(file)} for file in files]
        pair.ask(asked[0], asked[1])
        tokens = batch["input_ids"].shape
        first, second = (
            _read_output(worker, answer, file, tokens)
            for worker, answer, file in zip(pair.workers, pair.answers(), files, strict=True)
        )
        if first.shape != second.shape:
            raise ArtifactError(
                f"the artifact gives outputs of shape {list(second.shape)} and its baseline of "
                f"shape {list(first.shape)}: a different model"
            )
        yield numbers, (first, second)


def _read_output(
    worker: Worker, answer: dict[str, Any], file: Path, tokens: tuple[int, ...]
) -> np.ndarray:
    """Refuse an answer whose shape, or whose file's size, is not what was asked for."""
    shape = answer.get("shape")
    size = file.stat().st_size if file.is_file() else 0
    good = (
        isinstance(shape, list)
        and all(type(length) is int and length > 0 for length in shape)
        and (len(shape) == 2 or (len(shape) == 3 and shape[1] == tokens[1]))
        and shape[0] == tokens[0]
        and size == 4 * math.prod(shape)
    )
    if not good:
        raise worker.error(
            f"answered numbers of shape {shape} in {size} bytes for {tokens[0]} texts of "
            f"{tokens[1]} tokens"
        )
    return np.fromfile(file, dtype=np.float32).reshape(shape)


def _add(
    so_far: _Difference, outputs: tuple[np.ndarray, np.ndarray], lengths: Sequence[int]
) -> _Difference:
    """Add the numbers of a batch, without those of padding."""
    squares, baseline_squares = so_far.squares, so_far.baseline_squares
    identical, lost = so_far.identical, [so_far.lost_by_baseline, so_far.lost_by_candidate]
    for first, second, length in zip(*outputs, lengths, strict=True):
        kept = slice(None) if first.ndim == 1 else slice(length)
        a, b = (numbers[kept].astype(np.float64) for numbers in (first, second))
        finite = [bool(np.isfinite(numbers).all()) for numbers in (a, b)]
        lost = [count + (not good) for count, good in zip(lost, finite, strict=True)]
        identical = identical and np.array_equal(a, b)
        if all(finite):
            squares += float(((a - b) ** 2).sum())
            baseline_squares += float((a**2).sum())
    return _Difference(squares, baseline_squares, identical, lost[0], lost[1])


def _not_finite(difference: _Difference, texts: int) -> tuple[str, ...]:
    lost = {"baseline": difference.lost_by_baseline, "artifact": difference.lost_by_candidate}
    return tuple(
        f"not finite: the {whose}'s outputs hold a NaN or an infinity in {count} of {texts} texts"
        for whose, count in lost.items()
        if count
    )
