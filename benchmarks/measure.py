"""Run commands and measure them from outside; describe the machine; write results.

As a script, `python measure.py RESULT.json cpu|gpu COMMAND...` runs one command. It stays a process
of a few megabytes because Linux counts what the parent held before `exec` towards the child's peak.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Measured:
    """What a command took: wall time, peak memory of its largest process, and processor time of
    all of them, which other load on the machine does not change much.
    """

    seconds: float
    peak_bytes: int
    cpu_seconds: float
    device_peak_bytes: int | None = None
    """The most memory of the GPU in use, less what was in use before; None: not looked at."""


def run_measured(
    command: Sequence[str | os.PathLike[str]], log: Path, *, gpu: bool = False
) -> Measured:
    """Run a command as a whole process, its output going to `log`.

    Args:
        command: its words.
        log: the file for its output.
        gpu: ask nvidia-smi ten times a second how much memory of the first visible GPU is in use.
            torch's allocator keeps what it once took, so that a short peak is seen as well.

    Raises:
        SystemExit: it failed; the end of the log is printed.
    """
    words = [os.fspath(word) for word in command]
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as stream:
        result = Path(folder, "measured.json")
        outcome = subprocess.run(
            [sys.executable, "-S", __file__, str(result), "gpu" if gpu else "cpu", *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=usual_environment(),
            check=False,
        )
        if outcome.returncode == 0:
            measured = json.loads(result.read_text())
            return Measured(**measured)
    tail = log.read_text(errors="replace")[-4000:]
    raise SystemExit(f"{tail}\nfailed with exit code {outcome.returncode}: {' '.join(words)}")


def usual_environment() -> dict[str, str]:
    """Return this process's environment, offline, in which Python keeps what it has compiled.

    Containers forbid it to; then every start compiles all of a tool's modules, for seconds.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def _run_one(result: Path, device: str, words: list[str]) -> int:
    samples: list[int] = []
    with _watch_gpu(samples) if device == "gpu" else nullcontext():
        start = time.monotonic()
        pid = os.posix_spawnp(words[0], words, os.environ)
        _, status, usage = os.wait4(pid, 0)
        seconds = time.monotonic() - start
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * unit,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "device_peak_bytes": max(samples) - samples[0] if samples else None,
    }
    result.write_text(json.dumps(measured))
    return os.waitstatus_to_exitcode(status)


@contextmanager
def _watch_gpu(samples: list[int]) -> Iterator[None]:
    """Append the bytes in use on the first visible GPU, the first time before the body runs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    query = ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.used"]
    query += ["--format=csv,noheader,nounits", "--loop-ms=100"]
    # A terminal of its own: into a pipe, lines would come late, and the last ones not at all.
    reading, writing = os.openpty()
    with subprocess.Popen(query, stdout=writing) as watched, os.fdopen(reading) as lines:
        os.close(writing)
        first = lines.readline().strip()
        if not first.isdigit():
            watched.kill()
            raise SystemExit(f"nvidia-smi does not say how much memory is in use: {first!r}")
        samples.append(int(first) * 2**20)
        reader = threading.Thread(target=_read_samples, args=(lines, samples), daemon=True)
        reader.start()
        try:
            yield
        finally:
            watched.terminate()
            reader.join()


def _read_samples(lines: TextIO, samples: list[int]) -> None:
    # A terminal ends with an error once its last writer is gone.
    with suppress(OSError):
        samples.extend(int(line) * 2**20 for line in lines if line.strip().isdigit())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def describe_machine() -> dict[str, Any]:
    """Return the processor, its cores and the memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages * page / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_commit() -> str:
    """Return the commit of the working tree, marked where files differ from it."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        found = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of some packages of this environment, and which are not installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # quantkit itself, where it runs from a folder.
            versions[name] = "not installed"
    return versions


def write_results(name: str, document: Mapping[str, Any], markdown: str) -> None:
    """Write `NAME.json` and `NAME.md` of benchmarks/results and print the latter."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(markdown, encoding="utf-8")
    print(markdown)


if __name__ == "__main__":
    sys.exit(_run_one(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
