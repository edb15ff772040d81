"""Run commands and measure them from outside; describe the machine; write results.

As a script, `python measure.py RESULT.json COMMAND...` runs one command. It stays a process of a
few megabytes because Linux counts what the parent held before `exec` towards the child's peak.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def run_measured(command: Sequence[str | os.PathLike[str]], log: Path) -> Measured:
    """Run a command as a whole process, its output going to `log`.

    Raises:
        SystemExit: it failed; the end of the log is printed.
    """
    words = [os.fspath(word) for word in command]
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as stream:
        result = Path(folder, "measured.json")
        outcome = subprocess.run(
            [sys.executable, "-S", __file__, str(result), *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        if outcome.returncode == 0:
            measured = json.loads(result.read_text())
            return Measured(**measured)
    tail = log.read_text(errors="replace")[-4000:]
    raise SystemExit(f"{tail}\nfailed with exit code {outcome.returncode}: {' '.join(words)}")


def _run_one(result: Path, words: list[str]) -> int:
    start = time.monotonic()
    pid = os.posix_spawnp(words[0], words, os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - start
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * unit,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    result.write_text(json.dumps(measured))
    return os.waitstatus_to_exitcode(status)


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
    """Return the versions of some packages of this environment."""
    return {name: importlib.metadata.version(name) for name in names}


def write_results(name: str, document: Mapping[str, Any], markdown: str) -> None:
    """Write `NAME.json` and `NAME.md` of benchmarks/results and print the latter."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(markdown, encoding="utf-8")
    print(markdown)


if __name__ == "__main__":
    sys.exit(_run_one(Path(sys.argv[1]), sys.argv[2:]))
