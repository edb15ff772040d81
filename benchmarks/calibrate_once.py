"""What it saves to calibrate once for several recipes, and what it costs in divergence.

Three recipes of the bundled demo model are quantized twice, in turns: each with a walk of its own,
and all from one folder of statistics of the original model. Times are those of one process until an
artifact is written: on a machine that others use, only the ratio of the processor's seconds says
something. The gates judge both artifacts of a recipe on the same windows.

usage: python benchmarks/calibrate_once.py [--no-gate]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import (
    ROOT,
    describe_commit,
    describe_machine,
    package_versions,
    write_results,
)

import quantkit

DEMO = ROOT / "models" / "demo-llama"
RECIPES = ("gptq4", "awq4", "int8")
WINDOWS = ("calibration.samples=128", "calibration.sequence_length=512")
"""Those of the recipe `demo`."""
PACKAGES = ("quantkit", "torch", "transformers", "compressed-tensors")
OTHER_STAGES = frozenset({"gate", "calibrate", "solve"})
"""Of the stopwatch: what is no work of this process, and what is a part of `quantize`."""


@dataclass(frozen=True)
class Row:
    """One job. kl: mean nats a token and the interval of the gate; None where it was not judged."""

    recipe: str
    way: str
    seconds: float
    cpu_seconds: float
    kl: tuple[float, float, float] | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all jobs and write the result; 1 where statistics do not save time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-gate", action="store_true", help="measure time alone")
    gate = not parser.parse_args(arguments).no_gate
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        # What is loaded and compiled once is nobody's.
        solve(work / "first", "gptq4", None, gate=False)
        rows = [take_statistics(work / "statistics")]
        for recipe in RECIPES:
            for way, statistics in (("walk", None), ("statistics", work / "statistics")):
                rows.append(solve(work / f"{recipe}-{way}", recipe, statistics, gate=gate))
    ratio = sum_of(rows, "walk") / sum_of(rows, "statistics")
    document = {
        "rows": [asdict(row) for row in rows],
        "ratio": ratio,
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "commit": describe_commit(),
        "command": "python benchmarks/calibrate_once.py",
    }
    write_results("calibrate_once", document, render(rows, ratio))
    return int(ratio < 1)


def take_statistics(output: Path) -> Row:
    """Calibrate once."""
    cpu = time.process_time()
    made = quantkit.calibrate("gptq4", model=DEMO, output=output, overrides=WINDOWS)
    return Row("all", "statistics", sum(made.seconds.values()), time.process_time() - cpu, None)


def solve(output: Path, recipe: str, statistics: Path | None, *, gate: bool) -> Row:
    """Quantize by one of the two ways."""
    cpu = time.process_time()
    until_gate: list[float] = []

    def watch(event: quantkit.Event) -> None:
        if event.stage == "write":
            until_gate[:] = [time.process_time() - cpu]

    result = quantkit.quantize(
        recipe,
        model=DEMO,
        output=output,
        overrides=WINDOWS,
        statistics=statistics,
        gate=gate,
        progress=watch,
    )
    spent = result.report.evidence["timings"]["seconds"]
    divergence = result.report.artifacts[0].judgement.kl
    return Row(
        recipe,
        "walk" if statistics is None else "statistics",
        sum(seconds for stage, seconds in spent.items() if stage not in OTHER_STAGES),
        until_gate[0],
        None if divergence is None else (divergence.value, divergence.low, divergence.high),
    )


def sum_of(rows: Sequence[Row], way: str) -> float:
    """Return the processor's seconds of all jobs of one way."""
    return sum(row.cpu_seconds for row in rows if row.way == way)


def render(rows: Sequence[Row], ratio: float) -> str:
    """Return the table in Markdown."""
    lines = [
        "| recipe | way | seconds | processor seconds | KL, nats per token |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        kl = "" if row.kl is None else "{:.4f} ({:.4f} to {:.4f})".format(*row.kl)
        lines.append(
            f"| {row.recipe} | {row.way} | {row.seconds:.1f} | {row.cpu_seconds:.1f} | {kl} |"
        )
    return "\n".join(lines) + (
        f"\n\nThree recipes with a walk each take {ratio:.2f} times the processor's time of one "
        f"calibration and three jobs from its statistics.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
