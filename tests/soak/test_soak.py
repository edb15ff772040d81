"""Many jobs in one process leave it as they found it: `make soak`, and fewer in `make trust`.

The first rotation through all kinds of jobs is left out of account. It loads what a process keeps
on purpose: modules, torch's kernels, what numba has compiled.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import ROOT, environment
from tests.soak.jobs import KINDS

FULL = os.environ.get("QUANTKIT_TRUST") == "full"
JOBS = 200 if FULL else 20
ENDS = {
    "solve": "UNJUDGED",
    "round_to_gguf": "UNJUDGED",
    "round_to_onnx": "UNJUDGED",
    "judge": "PASS",
    "judge_badly": "FAIL",
    "misspell": "RecipeError",
    "miss": "CheckpointError",
    "forget": "OutputError",
    "cancel": "Cancelled",
}
EXACT = (
    "files",
    "threads",
    "python_threads",
    "children",
    "temporary",
    "handlers",
    "warning_filters",
    "signals",
    "environment",
    "modules",
    "containers",
)
"""Figures that are the same after every job."""

MOST_OBJECTS = 10
"""New objects of Python a job: the standard library's own caches of packages grow by a few."""
MOST_KB = 64
"""Growth a job of the memory in use. The smallest thing worth leaking, the weights of a block of
the model, takes 100 KB; pages that the allocator moves about are a few KB a job over 150 jobs."""
MOST_KB_OF_ALL = 16 * 1024
"""Growth of the memory in use from the first jobs to the last: twice what it goes up and down."""


def find_slope(lines: Sequence[dict[str, Any]], name: str) -> float:
    """Return the growth of a figure a job: the median over all pairs of rotations.

    Theil and Sen's estimate, which no outlier moves, of the most in each rotation: within one the
    memory in use goes up and down by 8 MB, as the jobs differ.
    """
    size = len(KINDS)
    most = [
        max(line[name] for line in lines[begin : begin + size])
        for begin in range(0, len(lines) - size + 1, size)
    ]
    pairs = itertools.combinations(enumerate(most), 2)
    return statistics.median((b[1] - a[1]) / (size * (b[0] - a[0])) for a, b in pairs)


def test_a_leak_is_seen_among_jobs_that_use_different_memory() -> None:
    """And neither what one kind of job uses, nor a single leap, is taken for one."""
    kinds = [kind.__name__ for kind in KINDS]
    base = {kind: 1000 * place for place, kind in enumerate(kinds)}
    for leak in (0, 100):
        lines = [
            {"kind": kind, "kb": base[kind] + leak * number + (5000 if number == 30 else 0)}
            for number, kind in zip(range(60), itertools.cycle(kinds), strict=False)
        ]
        assert find_slope(lines, "kb") == leak


@pytest.mark.soak
def test_many_jobs_leave_the_process_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that fail, that are refused and that are cancelled too."""
    for name in ("temporary", "work"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.jobs", tmp_path / "work", str(JOBS)],
        cwd=ROOT,
        env=environment(TMPDIR=str(tmp_path / "temporary"), OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == JOBS
    for line in lines:
        assert line["end"] == ENDS.get(line["kind"], line["end"])

    # More than one rotation where there are enough.
    begin = 50 if FULL else len(KINDS)
    before, later = lines[:begin], lines[begin:]
    first, last = before[-1], later[-1]
    slope = find_slope(later, "memory_kb") if FULL else None
    with capfd.disabled():
        print(f"\n{JOBS} jobs, after job {begin} and after the last:")
        if slope is not None:
            print(f"  growth of the memory in use: {slope:+.1f} KB a job")
        for name in ("memory_kb", "objects", *EXACT):
            print(f"  {name.replace('_', ' '):16} {first[name]:>9,} {last[name]:>9,}")
    for name in EXACT:
        assert {line[name] for line in later} == {first[name]}, name
    assert first["children"] == 0
    assert last["objects"] - first["objects"] <= MOST_OBJECTS * len(later)
    if slope is not None:
        assert slope <= MOST_KB
    most = max(line["memory_kb"] for line in before) + MOST_KB_OF_ALL
    assert max(line["memory_kb"] for line in later) <= most
    left = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert [name for name in left if name.endswith(".partial")] == ["cancelled.partial"]
