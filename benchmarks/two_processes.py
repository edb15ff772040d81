"""What two processes of one core each calibrate in the time of one: tokens a second of the walk.

Runs the whole command, `quantkit quantize`, as one process and as two under torchrun, each process
with one thread and pinned to a core of its own. The runs alternate, so that other load meets both
alike. The walk is the forward passes, the second moments and, of two processes, the waiting for
each other and the exchange; what the job tells of it in `quantkit.json` is compared. The models are
the bundled one and one with wider layers and random weights. The codes of both artifacts are
counted too, which differ where a rounding was a near tie.

usage: python benchmarks/two_processes.py [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import describe_commit, describe_machine, package_versions, run_measured, write_results
from shapes import DEMO, SHAPES, write_checkpoint

LEAST_RATIO = 1.7
"""What two processes are to bring."""
PACKAGES = ("quantkit", "torch", "transformers")
WIDE = SHAPES["0.5b"].shortened(2)
SETTINGS = (
    "quantize.method=gptq",
    "quantize.effort=fast",
    "calibration.samples=64",
    "calibration.sequence_length=1024",
)


@dataclass(frozen=True)
class Run:
    """One job: the seconds of its walk and of all of its calibration and solving."""

    model: str
    processes: int
    tokens: int
    calibrate: float
    quantize: float


def main() -> int:
    """Run the jobs; 1 where two processes do not bring enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two processes need two cores")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_checkpoint(WIDE, work / "wide")
        models = {"demo": DEMO, f"{WIDE.name}, {WIDE.layers} blocks": work / "wide"}
        runs = [
            run_job(name, model, processes, work)
            for name, model in models.items()
            for _ in range(rounds)
            for processes in (1, 2)
        ]
        equal = {
            name: count_equal_bytes(work / f"{model.name}-1", work / f"{model.name}-2")
            for name, model in models.items()
        }
    ratios = {name: compare([run for run in runs if run.model == name]) for name in models}
    document = {
        "runs": [asdict(run) for run in runs],
        "ratios": ratios,
        "equal_bytes": equal,
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "commit": describe_commit(),
        "command": "python benchmarks/two_processes.py",
    }
    write_results("two_processes", document, render(runs, ratios, equal))
    return int(min(ratios.values()) < LEAST_RATIO)


def run_job(name: str, model: Path, processes: int, work: Path) -> Run:
    """Quantize a model and return what the job says that it took."""
    output = work / f"{model.name}-{processes}"
    cores = sorted(os.sched_getaffinity(0))
    job = ["-m", "quantkit", "quantize", "--recipe", "gptq4", "--model", str(model), "--no-gate"]
    job += [word for pair in SETTINGS for word in ("--set", pair)]
    job += ["--output", str(output), "--overwrite", "--device", "cpu"]
    command: list[str | os.PathLike[str]]
    if processes == 1:
        command = ["taskset", "--cpu-list", str(cores[0]), sys.executable, *job]
    else:
        # Each process takes the core of its number, then becomes the command.
        numbers = " ".join(map(str, cores))
        pinned = f'cores=({numbers}); exec taskset --cpu-list ${{cores[$LOCAL_RANK]}} "$@"'
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *start, "--no-python", "bash", "-c", pinned, "bash"]
        command += [sys.executable, *job]
    # What `env` gives reaches every process, and the benchmark's own environment stays.
    run_measured(["env", "OMP_NUM_THREADS=1", *command], work / "job.log")
    evidence = json.loads((output / "quantkit.json").read_text())
    seconds, data = evidence["timings"]["seconds"], evidence["calibration"]
    if evidence["compute"]["processes"] != processes:
        raise SystemExit(f"the job was done by {evidence['compute']['processes']} processes")
    return Run(
        name,
        processes,
        data["windows"] * data["sequence_length"],
        seconds["calibrate"],
        seconds["quantize"],
    )


def compare(runs: Sequence[Run]) -> float:
    """Return how many times the tokens a second of one process two have, by their medians."""
    one, two = (
        statistics.median(run.tokens / run.calibrate for run in runs if run.processes == count)
        for count in (1, 2)
    )
    return two / one


def count_equal_bytes(first: Path, second: Path) -> float:
    """Return the share of the bytes of two artifacts' tensors that are equal."""
    import torch
    from safetensors.torch import load_file

    equal = total = 0
    for path in sorted(first.rglob("*.safetensors")):
        theirs = load_file(second / path.relative_to(first))
        for name, tensor in load_file(path).items():
            mine, other = (each.flatten().view(torch.uint8) for each in (tensor, theirs[name]))
            equal += int((mine == other).sum())
            total += mine.numel()
    return equal / total


def render(runs: Sequence[Run], ratios: dict[str, float], equal: dict[str, float]) -> str:
    """Return the tables in Markdown."""
    lines = [
        "| model | processes | tokens a second of the walk | seconds of calibration and solving |",
        "|---|---:|---:|---:|",
    ]
    for run in runs:
        speed = run.tokens / run.calibrate
        lines.append(f"| {run.model} | {run.processes} | {speed:.0f} | {run.quantize:.1f} |")
    lines += ["", "| model | two processes against one | equal bytes |", "|---|---:|---:|"]
    lines += [f"| {name} | {ratios[name]:.2f} x | {equal[name]:.3%} |" for name in ratios]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
