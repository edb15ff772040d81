"""What a gate takes: time for 100 windows of 512 tokens, and memory by the number of windows.

Makes a 4-bit artifact of the bundled demo model with a quick job, then runs the real command
(`quantkit gate`, everything that it does by default) as a whole process: with an empty store of the
baseline's numbers, again with what that left, and without any store on 100, 200, 400 and 800
windows of 128 tokens, whose peak memory should be the same.

usage: python benchmarks/gate_speed.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import (
    ROOT,
    Measured,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)

DEMO = ROOT / "models" / "demo-llama"
LONGEST_SECONDS = 60.0
"""What the gate may take on two cores."""
GROWTH = 1.1
"""So many times the peak of the fewest windows is that of the most, at the most."""
PACKAGES = ("quantkit", "torch", "transformers", "compressed-tensors")
COUNTS = (100, 200, 400, 800)


@dataclass(frozen=True)
class Row:
    """One gate."""

    what: str
    windows: int
    sequence_length: int
    measured: Measured


def main() -> int:
    """Make the artifact, run the gates; 1 where a bound is broken."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        os.environ["QUANTKIT_CACHE"] = str(work / "store")
        artifact = make_artifact(work)
        rows = [
            run_gate(artifact, work, "first", 100, 512),
            run_gate(artifact, work, "again", 100, 512),
        ]
        os.environ["QUANTKIT_CACHE_BYTES"] = "0"
        rows += [run_gate(artifact, work, "without a store", count, 128) for count in COUNTS]
    document = {
        "rows": [asdict(row) for row in rows],
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "commit": describe_commit(),
        "command": "python benchmarks/gate_speed.py",
    }
    write_results("gate_speed", document, render(rows))
    peaks = [row.measured.peak_bytes for row in rows[2:]]
    return int(rows[0].measured.seconds > LONGEST_SECONDS or peaks[-1] > GROWTH * peaks[0])


def make_artifact(work: Path) -> Path:
    """Quantize the demo model, quickly."""
    output = work / "demo"
    quick = ("quantize.method=rtn", "calibration.samples=16", "calibration.sequence_length=256")
    run_measured(
        [
            *quantkit("quantize", "--recipe", "demo", "--no-gate"),
            *settings(quick),
            "--output",
            output,
        ],
        work / "quantize.log",
    )
    return output / "compressed-tensors"


def run_gate(artifact: Path, work: Path, what: str, windows: int, length: int) -> Row:
    """Judge the artifact on so many windows, no more and no fewer."""
    wanted = (
        f"gate.samples={windows}",
        f"gate.max_samples={windows}",
        f"gate.sequence_length={length}",
        # An artifact that fails is measured all the same, but the command would end with 3.
        "gate.max_kl=1",
        "gate.max_perplexity_increase=1",
        "gate.min_top1_agreement=0.5",
    )
    words = [
        *quantkit("gate", artifact, "--baseline", DEMO, "--quiet", "--overwrite"),
        *settings(wanted),
        "--output",
        work / "gate",
    ]
    return Row(what, windows, length, run_measured(words, work / "gate.log"))


def quantkit(*words: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """The command line of this interpreter's quantkit."""
    return [sys.executable, "-m", "quantkit", *words]


def settings(pairs: Sequence[str]) -> list[str]:
    """`--set` before each pair."""
    return [word for pair in pairs for word in ("--set", pair)]


def render(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| gate | windows | seconds | processor seconds | peak of its largest process |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        taken = row.measured
        lines.append(
            f"| {row.what} | {row.windows} x {row.sequence_length} | {taken.seconds:.1f} | "
            f"{taken.cpu_seconds:.1f} | {taken.peak_bytes / 2**20:.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
