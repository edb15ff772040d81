"""How fast a decoder's artifact is beside the same graph in float (docs/gate.md, "Speed")."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ResourceError
from quantkit.formats.onnx.decoder import write_float_decoder
from quantkit.judging.evaluate import WORKERS
from quantkit.judging.places import ONNX_RUNTIME
from quantkit.judging.timing import LONGEST_SECONDS, SHORTER, Work, plan_work, read_durations
from quantkit.judging.worker import Pair, machine_threads, running_pair, worker_command
from quantkit.records import Event, Progress, Speed

REPETITIONS = 7

_MARGIN = 1 << 28
"""Bytes of memory and disk beside the weights."""


def measure_decoder_speed(
    checkpoint: Checkpoint,
    artifact: Path,
    *,
    threads: int | None = None,
    repetitions: int = REPETITIONS,
    python: str | None = None,
    timeout_seconds: float = 3600.0,
    progress: Progress | None = None,
) -> tuple[Speed, ...]:
    """Write the checkpoint's graph in float to a temporary folder, and time it and the artifact.

    What is not named here is as of `time_decoders`.

    Args:
        checkpoint: the artifact's original.
        artifact: folder or ONNX file.

    Raises:
        ResourceError: memory or disk are too small for both.
        PlanError: the checkpoint has no graph.
        WorkerError, InputError: as `time_decoders`.
    """
    stored = sum(info.size for info in checkpoint.tensors.values())
    beside = f"{glob.escape(artifact.name)}*"
    files = artifact.iterdir() if artifact.is_dir() else artifact.parent.glob(beside)
    own = sum(file.stat().st_size for file in files if file.is_file())
    with tempfile.TemporaryDirectory(prefix="quantkit-speed-", ignore_cleanup_errors=True) as name:
        # ONNX Runtime computes in float32, and holds weights that it rearranges twice for a while.
        _check_room(Path(name), disk=stored, memory=3 * stored + 2 * own)
        baseline = write_float_decoder(checkpoint, Path(name) / "float")
        return time_decoders(
            baseline,
            artifact,
            threads=threads,
            repetitions=repetitions,
            python=python,
            timeout_seconds=timeout_seconds,
            progress=progress,
        )


def time_decoders(
    baseline: Path,
    artifact: Path,
    *,
    threads: int | None = None,
    repetitions: int = REPETITIONS,
    python: str | None = None,
    timeout_seconds: float = 3600.0,
    progress: Progress | None = None,
) -> tuple[Speed, ...]:
    """Time two graphs in ONNX Runtime on the CPU: tokens per second of decoding and of prefill.

    Each is loaded once, in a process of its own that waits while the other computes. The
    repetitions alternate, so that a machine that gets slower does so for both; one before them is
    not counted. onnxruntime-genai runs them where both folders are made for it.

    Args:
        baseline, artifact: folders, or ONNX files.
        threads: of each process; None: the cores that this process may use.
        repetitions: those that are counted, of each.
        python: interpreter that has ONNX Runtime; None is this one.
        timeout_seconds: how long a worker may be silent about one repetition.
        progress: called after each repetition.

    Raises:
        WorkerError: a worker died, hung or could not do its work.
        ResourceError: a worker ran out of memory.
        InputError: the interpreter cannot be started or lacks a package.
    """
    threads = threads or machine_threads()
    command = worker_command(python, WORKERS[ONNX_RUNTIME])
    with running_pair(command, command, timeout_seconds, threads=threads) as pair:
        work, runtime = _load(pair, (baseline, artifact), threads)
        work, prefills, decodings = _repeat(pair, work, repetitions, progress)
    rows = (
        (decodings, work.new, f"decoding of {work.new} tokens after {work.prompt}"),
        (prefills, work.prompt, f"prefill of 1 x {work.prompt} tokens"),
    )
    return tuple(
        Speed(
            unit="tokens",
            what=what,
            baseline=count / median(seconds[0]),
            artifact=count / median(seconds[1]),
            runtime=runtime,
            threads=threads,
            repetitions=repetitions,
        )
        for seconds, count, what in rows
    )


def _load(pair: Pair, paths: Sequence[Path], threads: int) -> tuple[Work, str]:
    """Return what both can do, and what does it."""
    common = {"op": "load", "device": "cpu", "threads": threads}
    requests = [common | {"path": str(path.resolve())} for path in paths]
    pair.ask(requests[0], requests[1])
    loaded = pair.answers()
    work = plan_work(pair.workers, loaded)
    package = "onnxruntime-genai" if work.generator else "onnxruntime"
    versions = loaded[1].get("versions")
    version = versions.get(package, "") if isinstance(versions, dict) else ""
    return work, f"{package} {version}".strip()


def _repeat(
    pair: Pair, work: Work, repetitions: int, progress: Progress | None
) -> tuple[Work, list[list[float]], list[list[float]]]:
    """Return what was done, shortened where it takes too long, and the seconds of prefill and of
    decoding: for each worker those of each repetition."""
    first = sum(sum(_time(pair, which, work.shorter)) for which in (0, 1))
    if SHORTER * (repetitions + 1) * first > LONGEST_SECONDS:
        work = work.shorter
    prefills: list[list[float]] = [[], []]
    decodings: list[list[float]] = [[], []]
    for number in range(repetitions + 1):
        for which in (0, 1):
            prefill, decoding = _time(pair, which, work)
            if number:
                prefills[which].append(prefill)
                decodings[which].append(decoding)
        if progress is not None:
            progress(Event("speed", number, repetitions, "repetitions of both graphs"))
    return work, prefills, decodings


def _time(pair: Pair, which: int, work: Work) -> tuple[float, float]:
    """Let one worker compute while the other waits; return seconds of prefill and of decoding."""
    return read_durations(pair.workers[which], pair.ask_one(which, work.request))


def _check_room(folder: Path, *, disk: int, memory: int) -> None:
    """Refuse what would fill the disk or the memory.

    Raises:
        ResourceError: there is less than is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < disk + _MARGIN:
        raise ResourceError(
            f"the graph in float takes {_gigabytes(disk)} and {folder.parent} has "
            f"{_gigabytes(free)} free; TMPDIR names another folder"
        )
    available = _available_memory()
    if available is not None and available < memory + _MARGIN:
        raise ResourceError(
            f"both graphs take some {_gigabytes(memory)} of memory, and {_gigabytes(available)} "
            "are available"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _available_memory() -> int | None:
    """Bytes that Linux could give; None elsewhere."""
    table = Path("/proc/meminfo")
    lines: Sequence[str] = table.read_text("ascii").splitlines() if table.is_file() else ()
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((1024 * int(kilobytes) for kilobytes in found), None)
