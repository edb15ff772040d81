"""What `quantkit plan` foretells beside what jobs take: time by stages and peak memory.

Runs the real command for each case and reads both from the evidence of its artifact. The bounds:
peak memory is foretold at most 20 % above the measured one and never below, time within 50 %.
With `--fit`, costs are proposed that fit all measured cases (quantkit/planning/costs.py).

usage: python benchmarks/predictions.py [--cases NAME...] [--work FOLDER] [--fit] [--list]
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import (
    ROOT,
    describe_commit,
    describe_machine,
    package_versions,
    usual_environment,
    write_results,
)
from performance_tables import WITHIN
from shapes import DEMO, SHAPES, Shape

MEMORY_ABOVE = 0.20
TIME_APART = 0.50
NEARNESS = 0.02
"""How much a fit keeps to the present costs: what few cases have in them stays as it is."""
SHORTEST_SECONDS = 0.2
"""Stages that take less say nothing to a fit."""
VERDICTS = (0, 3, 4)
"""Exit codes of jobs that came to their end: PASS, FAIL, INCONCLUSIVE."""
PACKAGES = ("quantkit", "torch", "transformers", "compressed-tensors")
WINDOWS = ("calibration.samples=64", "calibration.sequence_length=512")


@dataclass(frozen=True)
class Case:
    """A job: a recipe on a model, with some of its keys changed."""

    name: str
    recipe: str
    shape: Shape
    settings: tuple[str, ...] = ()
    gated: bool = False
    memory: str | None = None
    """As --memory: little more than the least that the job asks for."""


@dataclass(frozen=True)
class Row:
    """What was foretold of a case and what it took; `terms` are ideal seconds by stage."""

    case: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    predicted_bytes: int
    measured_bytes: int
    wall_seconds: float
    cpu_seconds: float
    disk_bytes: int
    """What the plan asked for."""
    output_bytes: int
    """What the output has in the end."""
    terms: Mapping[str, Mapping[str, float]]

    @property
    def memory_ratio(self) -> float:
        """Foretold over measured."""
        return self.predicted_bytes / self.measured_bytes

    @property
    def total(self) -> tuple[float, float]:
        """Seconds of all stages, foretold and measured."""
        found = [
            sum(seconds for stage, seconds in each.items() if stage not in WITHIN)
            for each in (self.predicted, self.measured)
        ]
        return found[0], found[1]

    def broken(self) -> list[str]:
        """Return which bounds do not hold."""
        found = []
        if not 1 <= self.memory_ratio <= 1 + MEMORY_ABOVE:
            found.append(f"memory {self.memory_ratio:.2f} of the measured")
        predicted, measured = self.total
        if not is_near(predicted, measured):
            found.append(f"time {predicted / measured:.2f} of the measured")
        return found


def is_near(predicted: float, measured: float) -> bool:
    """Whether a time is foretold well enough."""
    return abs(predicted - measured) <= TIME_APART * measured


def make_cases() -> dict[str, Case]:
    """Return the cases by name."""
    demo, small, wide = SHAPES["demo"], SHAPES["0.5b"].shortened(4), SHAPES["2gb"].shortened(4)
    methods = ("rtn", "gptq", "awq", "awq+gptq")
    alone = ("gate.reuse_baseline=false",)
    cases = [
        Case("demo", "demo", demo, alone, gated=True),
        *(Case(f"demo {each}", "demo", demo, (f"quantize.method={each}",)) for each in methods),
        Case("demo int8", "int8", demo, alone, gated=True),
        Case("demo fp8", "fp8", demo),
        Case("demo fp8-kv", "fp8-kv", demo),
        Case("demo gguf-q4", "gguf-q4", demo),
        Case("demo onnx-int4", "onnx-int4", demo),
        *(
            Case(f"0.5b {each}", "demo", small, (f"quantize.method={each}", *WINDOWS))
            for each in methods
        ),
        Case("0.5b int8", "int8", small, WINDOWS),
        Case("0.5b gguf-q4", "gguf-q4", small, WINDOWS),
        Case("2gb rtn", "demo", wide, ("quantize.method=rtn",)),
        Case("2gb gptq", "demo", wide, ("quantize.method=gptq", *WINDOWS)),
        *(
            Case(f"{name}, little memory", "demo", shape, settings, memory=memory)
            for name, shape, settings, memory in (
                ("demo gptq", demo, ("quantize.method=gptq",), "0.80GB"),
                ("demo awq", demo, ("quantize.method=awq",), "0.85GB"),
                ("0.5b gptq", small, ("quantize.method=gptq", *WINDOWS), "1.15GB"),
                ("0.5b awq", small, ("quantize.method=awq", *WINDOWS), "1.08GB"),
                ("2gb gptq", wide, ("quantize.method=gptq", *WINDOWS), "1.48GB"),
            )
        ),
    ]
    return {case.name: case for case in cases}


def find_model(shape: Shape, work: Path) -> Path:
    """Return the folder of a checkpoint of the shape, written if it is not there."""
    if shape == SHAPES["demo"]:
        return DEMO
    folder = work / f"{shape.name}-{shape.layers}"
    if not (folder / "config.json").exists():
        script = str(Path(__file__).with_name("shapes.py"))
        layers = ["--layers", str(shape.layers)]
        subprocess.run([sys.executable, script, shape.name, str(folder), *layers], check=True)
    return folder


def run_case(case: Case, work: Path, device: str) -> Row:
    """Run the command as a whole process and read its evidence; any verdict will do.

    Raises:
        SystemExit: the job failed.
    """
    model, output = find_model(case.shape, work), work / "artifact"
    words = ["--recipe", case.recipe, "--model", str(model), "--output", str(output)]
    for setting in case.settings:
        words += ["--set", setting]
    options = [*words, "--device", device, "--quiet", "--overwrite"]
    options += [] if case.gated else ["--no-gate"]
    options += [] if case.memory is None else ["--memory", case.memory]
    log = work / "log.txt"
    with log.open("wb") as stream:
        # By way of a small process: what a parent holds counts towards its child's peak.
        small = [sys.executable, "-S", str(Path(__file__).with_name("measure.py"))]
        small += [str(work / "measured.json"), "cpu"]
        outcome = subprocess.run(
            [*small, sys.executable, "-m", "quantkit", "quantize", *options],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=usual_environment(),
            check=False,
        )
    if outcome.returncode not in VERDICTS:
        raise SystemExit(f"{case.name} failed:\n{log.read_text(errors='replace')[-4000:]}")
    measured = json.loads((work / "measured.json").read_text())
    evidence = json.loads((output / "quantkit.json").read_text(encoding="utf-8"))
    timings = evidence["timings"]
    predicted = timings["predicted"]
    row = Row(
        case=case.name,
        predicted=predicted["seconds"],
        measured=timings["seconds"],
        predicted_bytes=predicted["peak_memory_bytes"],
        measured_bytes=timings["peak_memory_bytes"],
        wall_seconds=measured["seconds"],
        cpu_seconds=measured["cpu_seconds"],
        disk_bytes=predicted["disk_bytes"],
        output_bytes=sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        terms=explain(case, model, output / "quantkit.json"),
    )
    shutil.rmtree(output)
    return row


def explain(case: Case, model: Path, evidence: Path) -> dict[str, dict[str, float]]:
    """Return the terms of a prediction: stage -> term -> ideal seconds, from a process of its own.

    Torch in this one would count towards the measured commands.
    """
    words = [sys.executable, __file__, "--explain", case.recipe, str(model), str(evidence)]
    words += [*case.settings, *([] if case.gated else ["--no-gate"])]
    found = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    terms: dict[str, dict[str, float]] = json.loads(found.stdout)
    return terms


def print_terms(recipe: str, model: str, evidence: Path, rest: Sequence[str]) -> None:
    """Print the terms of a job whose evidence is there, as JSON."""
    import torch

    from quantkit.checkpoint.reader import open_checkpoint
    from quantkit.checkpoint.source import resolve_source
    from quantkit.inputs import load
    from quantkit.job import describe_workload, plan_job
    from quantkit.planning.costs import find_terms
    from quantkit.records import MachineProbe

    about = json.loads(evidence.read_text(encoding="utf-8"))
    gate = "--no-gate" not in rest
    loaded = load(recipe, model, None, [word for word in rest if word != "--no-gate"])
    checkpoint = open_checkpoint(resolve_source(loaded.model))
    device = torch.device(about["compute"]["device"])
    dtype = getattr(torch, about["compute"]["dtype"])
    plan = plan_job(loaded.recipe, checkpoint, gate=gate, device=device.type)
    work = describe_workload(loaded.recipe, checkpoint, plan, device, dtype, gate=gate)
    known = about["timings"]["predicted"]["probe"]
    probe = MachineProbe(**{**known, "accelerator": None})
    if plan.prediction is not None and device.type == "cuda":
        probe = replace(probe, accelerator=plan.prediction.probe.accelerator)
    terms = find_terms(plan, work, probe)
    print(json.dumps({stage: dict(each) for stage, each in terms.items()}))


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Return costs that come near the measured stages, and stay near the present ones.

    Each stage of each case is an equation, divided by its measured seconds so that short ones count
    as much as long ones; the parts of `quantize` and its rest are told apart. Costs are relative to
    the present ones and at least a tenth of them.
    """
    import torch

    from quantkit.planning.costs import COSTS

    names = list(COSTS)
    equations = []
    for row in rows:
        for stage, terms in row.terms.items():
            if stage not in row.measured:
                continue
            seconds, counted = row.measured[stage], dict(terms)
            for part in WITHIN if stage == "quantize" else ():
                if row.terms.get(part):
                    seconds -= row.measured.get(part, 0.0)
                    counted = {
                        name: counted[name] for name in counted.keys() - set(row.terms[part])
                    }
            if seconds > SHORTEST_SECONDS and counted:
                equations.append([COSTS[name] * counted.get(name, 0.0) / seconds for name in names])
    matrix = torch.tensor(equations, dtype=torch.float64)
    near = NEARNESS * torch.eye(len(names), dtype=torch.float64)
    left = matrix.T @ matrix + near
    right = matrix.sum(0) + near.sum(0)
    factors = torch.ones(len(names), dtype=torch.float64)
    for _ in range(2000):
        # Coordinate descent, each factor within its bound.
        for index in range(len(names)):
            rest = right[index] - left[index] @ factors + left[index, index] * factors[index]
            factors[index] = max(0.1, float(rest / left[index, index]))
    found = (float(f"{COSTS[name] * float(f):.2g}") for name, f in zip(names, factors, strict=True))
    return dict(zip(names, found, strict=True))


def render(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the results as Markdown: a row a case, seconds foretold / measured."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row.predicted))
    titles = [*stages, "all", "memory, MB", "disk, MB", "within"]
    lines = [
        "# What is predicted and what it takes",
        "",
        "Predicted / measured: seconds, peak memory of the job's process, and the disk that the "
        "plan asks for / what the output has in the end.",
        "",
        f"| case | {' | '.join(titles)} |",
        f"|---|{'---:|' * (len(titles) - 1)}---|",
    ]
    for row in rows:
        cells = [
            f"{row.predicted.get(stage, 0.0):.1f} / {row.measured.get(stage, 0.0):.1f}"
            for stage in stages
        ]
        cells.append("{:.1f} / {:.1f}".format(*row.total))
        cells.append(f"{row.predicted_bytes / 1e6:.0f} / {row.measured_bytes / 1e6:.0f}")
        cells.append(f"{row.disk_bytes / 1e6:.0f} / {row.output_bytes / 1e6:.0f}")
        lines.append(f"| {row.case} | {' | '.join(cells)} | {', '.join(row.broken()) or 'yes'} |")
    machine = document["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"Within: memory 0 to {MEMORY_ABOVE:.0%} above the measured peak, the time of all "
            f"stages within {TIME_APART:.0%}.",
            "",
            f"- machine: {machine['processor']}, {machine['cores']} cores, "
            f"{machine['memory_gib']} GiB",
            f"- versions: {', '.join(f'{k} {v}' for k, v in document['versions'].items())}; "
            f"commit {document['commit']}",
            f"- command: `{document['command']}`",
            "",
        ]
    )


def main() -> int:
    """Parse the arguments and run the cases; 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="by default all of them")
    parser.add_argument("--work", type=Path, help="keep checkpoints and logs in this folder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--fit", action="store_true", help="print costs that fit what was measured")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    arguments = parser.parse_args()
    cases = make_cases()
    if arguments.list:
        print("\n".join(cases))
        return 0
    work = arguments.work.resolve() if arguments.work else None
    os.chdir(ROOT)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for name in arguments.cases or cases:
            rows.append(run_case(cases[name], work, arguments.device))
            seconds, row = "{:.1f} / {:.1f} s".format(*rows[-1].total), rows[-1]
            memory = f"{row.predicted_bytes / 1e6:.0f} / {row.measured_bytes / 1e6:.0f} MB"
            print(f"{name}: {seconds}, {memory}  {', '.join(row.broken())}", file=sys.stderr)
    document = {
        "rows": [{**asdict(row), "broken": row.broken()} for row in rows],
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "commit": describe_commit(),
        "command": shlex.join(["python", "benchmarks/predictions.py", *sys.argv[1:]]),
    }
    write_results("predictions", document, render(document, rows))
    if arguments.fit:
        for name, cost in fit(rows).items():
            print(f'        "{name}": {cost},')
    return int(any(row.broken() for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--explain"]:
        print_terms(sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
    else:
        sys.exit(main())
