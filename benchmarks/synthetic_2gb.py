"""Peak memory on a checkpoint of 2 GB: quantize a Llama of random weights with rtn and gptq.

Writes the checkpoint tensor by tensor (shapes.py), then runs the real command (`quantize
--no-gate`) for each method as a whole process and compares its peak memory with what quantkit
promises: at most 1.2 GB besides the activations of the calibration windows.

usage: python benchmarks/synthetic_2gb.py [--work FOLDER] [--layers 20]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import (
    ROOT,
    Measured,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)
from shapes import SHAPES

SHAPE = SHAPES["2gb"]
BOUND_BYTES = 1_200_000_000
WINDOWS, LENGTH = 16, 256
METHODS = ("rtn", "gptq")
PACKAGES = ("quantkit", "torch", "transformers", "compressed-tensors")


@dataclass(frozen=True)
class Row:
    """One method: what it took and what it may take."""

    method: str
    measured: Measured
    activation_bytes: int
    artifact_bytes: int

    @property
    def bound_bytes(self) -> int:
        """The promised peak."""
        return BOUND_BYTES + self.activation_bytes


def job_options(model: Path, output: Path, method: str) -> list[str]:
    """Return the arguments that `plan` and `quantize` share."""
    settings = {
        "quantize.method": method,
        "calibration.samples": WINDOWS,
        "calibration.sequence_length": LENGTH,
    }
    words = ["--recipe", "demo", "--model", str(model), "--output", str(output)]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return words


def run_method(model: Path, work: Path, method: str) -> Row:
    """Quantize with one method and measure."""
    output = work / f"artifact-{method}"
    command = [sys.executable, "-m", "quantkit"]
    options = job_options(model, output, method)
    planned = subprocess.run(
        [*command, "plan", *options, "--json"], check=True, capture_output=True, text=True
    )
    activations = json.loads(planned.stdout)["activation_bytes"] if method != "rtn" else 0
    measured = run_measured(
        [*command, "quantize", *options, "--no-gate", "--quiet"], work / f"{method}.log"
    )
    weights = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    shutil.rmtree(output)
    return Row(method, measured, activations, weights)


def render(document: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the results as Markdown."""
    machine = document["machine"]
    lines = [
        "# Peak memory on a checkpoint of 2 GB",
        "",
        f"A Llama of random weights: {document['layers']} layers, hidden {SHAPE.hidden}, "
        f"feed-forward {SHAPE.intermediate}, vocabulary {SHAPE.vocabulary:,}, "
        f"{document['weight_bytes'] / 1e9:.2f} GB in bfloat16. W4A16, groups of 128; gptq "
        f"with {WINDOWS} windows of {LENGTH} tokens.",
        "",
        "| method | time, s | peak memory, MB | promised, MB | within | artifact, MB |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        within = "yes" if row.measured.peak_bytes <= row.bound_bytes else "**no**"
        lines.append(
            f"| {row.method} | {row.measured.seconds:.0f} | {row.measured.peak_bytes / 1e6:.0f} "
            f"| {row.bound_bytes / 1e6:.0f} | {within} | {row.artifact_bytes / 1e6:.0f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += [
        "",
        f"Promised: {BOUND_BYTES / 1e6:.0f} MB and the activations of the calibration windows as "
        "`quantkit plan` foretells them. Peak memory is the largest resident set of the process "
        "(file pages that it maps included).",
        "",
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- quantkit: {versions}; commit {document['commit']}",
        f"- command: `{document['command']}`",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Parse the arguments, write the checkpoint, run both methods; 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--work", type=Path, help="keep the checkpoint and logs in this folder")
    arguments = parser.parse_args()
    work = arguments.work.resolve() if arguments.work else None
    os.chdir(ROOT)

    with tempfile.TemporaryDirectory() as scratch:
        work = work or Path(scratch)
        model = work / f"synthetic-{arguments.layers}"
        if not (model / "config.json").exists():
            # A process of its own: torch in this one would count towards the measured commands.
            script = str(ROOT / "benchmarks" / "shapes.py")
            words = [sys.executable, script, SHAPE.name, str(model)]
            subprocess.run([*words, "--layers", str(arguments.layers)], check=True)
        weight_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        rows = [run_method(model, work, method) for method in arguments.methods]

    document = {
        "layers": arguments.layers,
        "weight_bytes": weight_bytes,
        "rows": [{**asdict(row), "bound_bytes": row.bound_bytes} for row in rows],
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "commit": describe_commit(),
        "command": shlex.join(["python", "benchmarks/synthetic_2gb.py", *sys.argv[1:]]),
    }
    write_results("synthetic_2gb", document, render(document, rows))
    return int(any(row.measured.peak_bytes > row.bound_bytes for row in rows))


if __name__ == "__main__":
    sys.exit(main())
