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
import math
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contest import (
    PACKAGES,
    RECIPE,
    artifact_of,
    check_same_windows,
    describe_versions,
    export_windows,
    find_rival,
    judge,
    rival_command,
    rival_versions,
)
from measure import (
    ROOT,
    Measured,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)

JOBS = (
    ("llm-compressor", "gptq"),
    ("quantkit", "gptq"),
    ("quantkit", "gptq", "fast"),
    ("llm-compressor", "awq"),
    ("quantkit", "awq"),
    ("llm-compressor", "awq+gptq"),
    ("quantkit", "awq+gptq"),
    ("llm-compressor", "rtn"),
    ("quantkit", "rtn"),
)
RIVAL = "llm-compressor"


@dataclass
class Contestant:
    """One tool with one method: its runs, and what the judge found."""

    tool: str
    method: str
    effort: str | None = None
    """quantkit's, where it is not the usual one."""
    runs: list[Measured] = field(default_factory=list)
    kl: float = math.nan
    perplexity: float = math.nan
    agreement: float = math.nan
    weight_bytes: int = 0

    @property
    def key(self) -> str:
        """Name of the contestant's folder and log."""
        return "-".join(part for part in (self.tool, self.method, self.effort) if part)

    @property
    def label(self) -> str:
        """The method as the table calls it."""
        return f"{self.method}, effort {self.effort}" if self.effort else self.method


def make_command(
    contestant: Contestant, rival: Path, model: str, work: Path, output: Path
) -> list[str]:
    """Return the command of one job that leaves its artifact in `output`."""
    if contestant.tool == "quantkit":
        words = [sys.executable, "-m", "quantkit", "quantize", "--recipe", RECIPE, "--quiet"]
        words += ["--set", f"quantize.method={contestant.method}", "--no-gate"]
        if contestant.effort:
            words += ["--set", f"quantize.effort={contestant.effort}"]
        return [*words, "--output", str(output)]
    options = ["--method", contestant.method]
    return rival_command(RIVAL, rival, Path(model), work / "calibration.npy", output, options)


def judge_all(contestants: Sequence[Contestant], model: str, work: Path, last: int) -> float:
    """Measure every artifact on the evaluation windows; return the baseline's perplexity."""
    baseline = math.nan
    for contestant in contestants:
        artifact = artifact_of(contestant.tool, work / f"{contestant.key}-{last}")
        judged = judge(Path(model), artifact, work / "evaluation.npy")
        baseline = judged.baseline_perplexity
        contestant.kl = judged.kl
        contestant.perplexity = judged.perplexity
        contestant.agreement = judged.agreement
        contestant.weight_bytes = judged.weight_bytes
    return baseline


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
            f"| {c.tool} | {c.label} | {c.kl:.5f} | {c.perplexity:.3f} | {c.agreement:.2%} "
            f"| {c.weight_bytes / 1e6:.2f} | {statistics.median(seconds):.1f} "
            f"({seconds[0]:.1f}-{seconds[-1]:.1f}) | {peak / 1e6:.0f} |"
        )
    lines += [
        "",
        f"Time and memory are medians of {document['repeats']} runs (fastest to slowest), each a "
        "whole process that starts Python, reads the checkpoint and writes the artifact; memory is "
        "that of its largest process. The contestants took turns.",
        "",
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- quantkit: {describe_versions(document['versions'])}; commit {document['commit']}",
        f"- llm-compressor: {describe_versions(document['rival_versions'])}",
        f"- command: `{document['command']}`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, run every job, judge, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rival", type=Path, help="the interpreter of llm-compressor")
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq", "awq+gptq", "rtn"])
    parser.add_argument("--work", type=Path, help="keep the artifacts and logs in this folder")
    arguments = parser.parse_args()
    rival = find_rival(RIVAL, arguments.rival)
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
                command = make_command(contestant, rival, model, work, output)
                measured = run_measured(command, work / f"{contestant.key}-{repeat}.log")
                contestant.runs.append(measured)
                if contestant.tool == "quantkit":
                    check_same_windows(output, windows["calibration"]["sha256"])
                print(f"{contestant.key}: {measured.seconds:.1f} s", file=sys.stderr)
        perplexity = judge_all(contestants, model, work, arguments.repeats - 1)

    document = {
        "model": Path(model).name,
        **windows,
        "baseline_perplexity": perplexity,
        "contestants": [asdict(contestant) for contestant in contestants],
        "repeats": arguments.repeats,
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "rival_versions": rival_versions(RIVAL, rival),
        "commit": describe_commit(),
        "command": shlex.join(["python", "benchmarks/llm_compressor.py", *sys.argv[1:]]),
    }
    write_results("llm_compressor", document, render(document, contestants))


if __name__ == "__main__":
    main()
