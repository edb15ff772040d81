"""Side by side with llm-compressor: the same model, token windows, scheme and judge.

Each job is a whole process, from the command to the files on disk, and the contestants take turns.
quantkit runs through its command line with `--no-gate`; llm-compressor through
llm_compressor_job.py in its own environment (scripts/setup_rival.sh). Then one judge, the one of
quantkit's gate, measures every artifact on the same evaluation windows; independent_check.py
repeats its numbers without quantkit.

usage: python benchmarks/llm_compressor.py [--repeats 3] [--rival .venv-rival/bin/python]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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

RECIPE = "demo"
JOBS = (
    ("llm-compressor", "gptq"),
    ("quantkit", "gptq"),
    ("llm-compressor", "awq"),
    ("quantkit", "awq"),
    ("llm-compressor", "awq+gptq"),
    ("quantkit", "awq+gptq"),
    ("llm-compressor", "rtn"),
    ("quantkit", "rtn"),
)
PACKAGES = ("quantkit", "torch", "transformers", "compressed-tensors")
RIVAL_PACKAGES = ("llmcompressor", "torch", "transformers", "compressed-tensors")


@dataclass
class Contestant:
    """One tool with one method: its runs, and what the judge found."""

    tool: str
    method: str
    runs: list[Measured] = field(default_factory=list)
    kl: float = math.nan
    perplexity: float = math.nan
    agreement: float = math.nan
    weight_bytes: int = 0

    @property
    def key(self) -> str:
        """Name of the contestant's folder and log."""
        return f"{self.tool}-{self.method}"


def export_windows(folder: Path) -> dict[str, Any]:
    """Write calibration.npy and evaluation.npy as quantkit's own loader cuts them.

    A process of its own, because torch in this one would count towards every measured command.
    """
    code = f"""
import json, numpy
import quantkit
from quantkit.calibration.data import load_tokenizer, load_windows
from quantkit.checkpoint.source import resolve_source

recipe = quantkit.load_recipe({RECIPE!r})
folder = resolve_source(recipe.model).folder
tokenizer = load_tokenizer(folder)
hashes = {{"model": str(folder)}}
for name, spec, order in (
    ("calibration", recipe.calibration, "random"),
    ("evaluation", recipe.gate, "sequential"),
):
    windows = load_windows(
        spec.data, split=spec.split, text_column=spec.text_column, tokenizer=tokenizer,
        samples=spec.samples, sequence_length=spec.sequence_length, seed=spec.seed, order=order)
    numpy.save({str(folder)!r} + f"/{{name}}.npy", windows.ids)
    hashes[name] = {{"sha256": windows.sha256, "shape": list(windows.ids.shape)}}
print(json.dumps(hashes))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def make_command(
    contestant: Contestant, rival: Path, model: str, work: Path, output: Path
) -> list[str]:
    """Return the command of one job that leaves its artifact in `output`."""
    if contestant.tool == "quantkit":
        words = [sys.executable, "-m", "quantkit", "quantize", "--recipe", RECIPE, "--quiet"]
        words += ["--set", f"quantize.method={contestant.method}", "--no-gate"]
        return [*words, "--output", str(output)]
    script = ROOT / "benchmarks" / "llm_compressor_job.py"
    words = [str(rival), str(script), "--model", model, "--method", contestant.method]
    return [*words, "--windows", str(work / "calibration.npy"), "--output", str(output)]


def artifact_of(contestant: Contestant, output: Path) -> Path:
    """Return the checkpoint folder inside a job's output."""
    return output / "compressed-tensors" if contestant.tool == "quantkit" else output


def check_same_windows(output: Path, expected: str) -> None:
    """Make sure that quantkit's job calibrated on the windows that the rival got."""
    evidence = json.loads((output / "quantkit.json").read_text(encoding="utf-8"))
    calibration = evidence["calibration"]
    if calibration is not None and calibration["sha256"] != expected:
        raise SystemExit("quantkit calibrated on other windows than those of the rival")


def judge(contestants: Sequence[Contestant], model: str, work: Path, last: int) -> float:
    """Measure every artifact on the evaluation windows; return the baseline's perplexity."""
    import numpy as np

    from quantkit.judging.evaluate import evaluate
    from quantkit.records import TokenWindows

    ids = np.load(work / "evaluation.npy")
    windows = TokenWindows(ids, np.ones(ids.shape, dtype=np.float32), "benchmark", "")
    baseline = math.nan
    for contestant in contestants:
        artifact = artifact_of(contestant, work / f"{contestant.key}-{last}")
        result = evaluate(Path(model), artifact, windows)
        baseline = math.exp(statistics.fmean(result.baseline_nll))
        contestant.kl = statistics.fmean(result.kl)
        contestant.perplexity = math.exp(statistics.fmean(result.candidate_nll))
        contestant.agreement = statistics.fmean(result.agreement)
        contestant.weight_bytes = sum(p.stat().st_size for p in artifact.glob("*.safetensors"))
    return baseline


def rival_versions(rival: Path) -> dict[str, str]:
    """Return the versions in the rival's environment."""
    code = f"""
import importlib.metadata, json
print(json.dumps({{name: importlib.metadata.version(name) for name in {RIVAL_PACKAGES!r}}}))
"""
    done = subprocess.run([str(rival), "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def render(document: dict[str, Any], contestants: Sequence[Contestant]) -> str:
    """Return the results as Markdown."""
    machine = document["machine"]
    calibration, evaluation = document["calibration"], document["evaluation"]
    lines = [
        "# quantkit and llm-compressor",
        "",
        f"`{document['model']}`, W4A16, groups of 128, on "
        f"{calibration['shape'][0]} calibration windows of {calibration['shape'][1]} tokens; "
        f"judged on {evaluation['shape'][0]} windows of {evaluation['shape'][1]}. "
        f"The baseline's perplexity is {document['baseline_perplexity']:.3f}.",
        "",
        "| tool | method | KL, nats | perplexity | top-1 agreement | weights, MB "
        "| time, s | peak memory, MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in contestants:
        seconds = sorted(run.seconds for run in c.runs)
        peak = statistics.median(run.peak_bytes for run in c.runs)
        lines.append(
            f"| {c.tool} | {c.method} | {c.kl:.5f} | {c.perplexity:.3f} | {c.agreement:.2%} "
            f"| {c.weight_bytes / 1e6:.2f} | {statistics.median(seconds):.1f} "
            f"({seconds[0]:.1f}-{seconds[-1]:.1f}) | {peak / 1e6:.0f} |"
        )
    ours = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    theirs = ", ".join(f"{name} {version}" for name, version in document["rival_versions"].items())
    lines += [
        "",
        f"Time and memory are medians of {document['repeats']} runs (fastest to slowest), each a "
        "whole process that starts Python, reads the checkpoint and writes the artifact; memory is "
        "that of its largest process. The contestants took turns.",
        "",
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- quantkit: {ours}; commit {document['commit']}",
        f"- llm-compressor: {theirs}",
        f"- command: `{document['command']}`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, run every job, judge, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rival", type=Path, default=ROOT / ".venv-rival" / "bin" / "python")
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq", "awq+gptq", "rtn"])
    parser.add_argument("--work", type=Path, help="keep the artifacts and logs in this folder")
    arguments = parser.parse_args()
    if not arguments.rival.exists():
        raise SystemExit(f"no {arguments.rival}: run scripts/setup_rival.sh first")
    os.chdir(ROOT)

    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        windows = export_windows(work)
        model = windows.pop("model")
        contestants = [Contestant(*job) for job in JOBS if job[1] in arguments.methods]
        for repeat in range(arguments.repeats):
            for contestant in contestants:
                output = work / f"{contestant.key}-{repeat}"
                command = make_command(contestant, arguments.rival, model, work, output)
                measured = run_measured(command, work / f"{contestant.key}-{repeat}.log")
                contestant.runs.append(measured)
                if contestant.tool == "quantkit":
                    check_same_windows(output, windows["calibration"]["sha256"])
                print(f"{contestant.key}: {measured.seconds:.1f} s", file=sys.stderr)
        perplexity = judge(contestants, model, work, arguments.repeats - 1)

    document = {
        "model": Path(model).name,
        **windows,
        "baseline_perplexity": perplexity,
        "contestants": [asdict(contestant) for contestant in contestants],
        "repeats": arguments.repeats,
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "rival_versions": rival_versions(arguments.rival),
        "commit": describe_commit(),
        "command": shlex.join(["python", "benchmarks/llm_compressor.py", *sys.argv[1:]]),
    }
    write_results("llm_compressor", document, render(document, contestants))


if __name__ == "__main__":
    main()
