"""How fast an encoder's artifact is beside the same graph in float (docs/gate.md, "Speed")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from quantkit.encoders.data import make_batches
from quantkit.formats.onnx.container import open_graph
from quantkit.judging.encoders import ENCODER_WORKERS, load_request
from quantkit.judging.worker import Pair, machine_threads, running_pair, worker_command
from quantkit.records import EncoderInfo, Event, Progress, Speed, TextRows

TEXTS = 128
"""Texts of one repetition, at the most: the first of the data."""

FEW_TEXTS = 16
"""Texts of one repetition where the encoder is slow, and of the look at how slow it is."""

BATCH_TOKENS = 1024
"""Tokens of one batch, padding included, at the most (at least one text)."""

REPETITIONS = 5

LONGEST_SECONDS = 120.0
"""What all repetitions of both graphs may take, about."""

_Batches = Sequence[dict[str, Any]]


def measure_encoder_speed(
    float_graph: Path,
    artifact: Path,
    rows: TextRows,
    info: EncoderInfo,
    *,
    threads: int | None = None,
    repetitions: int = REPETITIONS,
    python: str | None = None,
    timeout_seconds: float = 3600.0,
    progress: Progress | None = None,
) -> Speed:
    """Time both graphs in ONNX Runtime on the CPU, on the same batches, one after the other.

    Each graph is loaded once, in a process of its own that waits while the other computes. The
    repetitions alternate, so that a machine that gets slower does so for both; one before them is
    not counted.

    Args:
        float_graph: the .onnx file of the unquantized encoder, or the folder that holds it.
        artifact: the same of the artifact.
        rows: texts as token ids.
        info: what the encoder takes.
        threads: of each process; None: the cores that this process may use.
        repetitions: passes over the texts that are counted, of each graph.
        python: interpreter that has ONNX Runtime; None is this one.
        timeout_seconds: how long a worker may be silent about one pass.
        progress: called after each repetition.

    Raises:
        ArtifactError: a graph is not there or damaged.
        WorkerError: a worker died, hung or could not do its work.
        ResourceError: a worker ran out of memory.
        InputError: the interpreter cannot be started or lacks a package.
    """
    threads = threads or machine_threads()
    graphs = [open_graph(path).path for path in (float_graph, artifact)]
    command = worker_command(python, ENCODER_WORKERS["onnxruntime"])
    tell = progress or (lambda event: None)
    with running_pair(command, command, timeout_seconds, threads=threads) as pair:
        first, second = (load_request(graph, info, "cpu", threads) for graph in graphs)
        pair.ask(first, second)
        versions = [answer.get("versions") for answer in pair.answers()]
        few = _choose_texts(pair, rows, info, repetitions)
        batches = _make_batches(few, info)
        seconds: list[tuple[float, float]] = []
        for number in range(repetitions + 1):
            seconds.append((_time(pair, 0, batches), _time(pair, 1, batches)))
            tell(Event("speed", number, repetitions, "repetitions of both graphs"))
    baseline, candidate = (median(column) for column in zip(*seconds[1:], strict=True))
    count = len(few.ids)
    tokens = sum(map(len, few.ids))
    return Speed(
        unit="sentences",
        what=f"{count} texts of {tokens / count:.0f} tokens on average, up to {BATCH_TOKENS} "
        "tokens at a time",
        baseline=count / baseline,
        artifact=count / candidate,
        runtime=_name_runtime(versions),
        threads=threads,
        repetitions=repetitions,
    )


def _choose_texts(pair: Pair, rows: TextRows, info: EncoderInfo, repetitions: int) -> TextRows:
    """Return as many texts as both graphs can encode in time, after a look at a few."""
    few = _first_texts(rows, FEW_TEXTS)
    batches = _make_batches(few, info)
    # The first pass is that of memory, which is not there yet.
    seconds = [[_time(pair, which, batches) for _ in range(2)][1] for which in (0, 1)]
    texts = LONGEST_SECONDS / (repetitions + 1) / (sum(seconds) / len(few.ids))
    return _first_texts(rows, min(TEXTS, max(FEW_TEXTS, int(texts))))


def _first_texts(rows: TextRows, count: int) -> TextRows:
    return replace(rows, ids=rows.ids[:count], type_ids=rows.type_ids[:count], labels=(), pairs=())


def _make_batches(rows: TextRows, info: EncoderInfo) -> _Batches:
    return [
        {name: array.tolist() for name, array in batch.items()}
        for _, batch in make_batches(rows, info, BATCH_TOKENS)
    ]


def _time(pair: Pair, which: int, batches: _Batches) -> float:
    """Let one worker compute all batches while the other waits; return its seconds."""
    answer = pair.ask_one(which, {"op": "time", "batches": batches})
    seconds = answer.get("seconds")
    if not isinstance(seconds, float) or seconds <= 0:
        raise pair.workers[which].error(f"answered {seconds!r} for a duration")
    return seconds


def _name_runtime(versions: Sequence[object]) -> str:
    first = versions[0] if isinstance(versions[0], dict) else {}
    for package in ("onnxruntime", "onnxruntime-gpu"):
        if package in first:
            return f"onnxruntime {first[package]}"
    return "onnxruntime"
