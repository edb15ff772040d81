"""How fast, and in how much memory: quantkit and llm-compressor alternately on the same jobs.

Each run is a whole process, from the command to the files on disk, on the same checkpoint and the
same token windows; quantkit runs through its command line with `--no-gate`, llm-compressor through
llm_compressor_job.py in its own environment (scripts/setup_rival.sh). Checkpoints other than the
bundled one have random weights (shapes.py). The speed of a large matrix product is measured before
each turn, and what the job must compute at least at that speed is its bound (bound.py). What is
promised of a case (cases.py) is judged. The exit code is 1 where a promise is not met, and 2 where
something could not be measured.

benchmarks/results/performance.json keeps the last result of each case, of a shortened model apart
from the whole one; performance.md and the tables of docs/performance.md are made from it.

usage: python benchmarks/run.py CASE... [--repeats 3] [--rival .venv-rival/bin/python | --alone]
         [--layers N] [--device cpu|cuda] [--work FOLDER]
       python benchmarks/run.py --render
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bound import PROBE_SECONDS, count_work, probe_speed
from cases import CASES, OURS, RIVAL, Case, Promises
from contest import PACKAGES, check_same_windows, find_rival, rival_command, rival_versions
from measure import (
    RESULTS,
    ROOT,
    Measured,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
)
from performance_results import keep_result, render_again, summarize
from shapes import DEMO

TEXT = ROOT / "calib_data" / "docs_calibration.txt"
CHARACTERS_PER_TOKEN = 4
"""More than a token of the bundled tokenizer has of the bundled text, on average (3.3)."""
UNUSED_WINDOWS = (4, 64)
"""Windows and tokens of each for jobs without calibration: the rival's script reads some."""
RIVAL_SCHEMES = {"w4a16": "W4A16", "fp8_dynamic": "FP8_DYNAMIC"}


@dataclass(frozen=True)
class Options:
    """What the command line says of all cases."""

    repeats: int
    rival_repeats: int
    rival: Path | None
    """Interpreter of llm-compressor's environment; None: quantkit runs alone."""
    work: Path
    probe_seconds: float


@dataclass(frozen=True)
class Inputs:
    """What both tools get."""

    model: Path
    text: Path
    windows: Path
    """.npy, int64 [N, T]."""
    sha256: str


@dataclass
class Runs:
    """What a case took so far."""

    measured: dict[str, list[Measured]] = field(default_factory=dict)
    speeds: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    """Of each job of ours: `timings` of its evidence."""
    dtype: str = ""
    """What the last job of ours computed in."""
    artifact_bytes: dict[str, int] = field(default_factory=dict)


# --- what the jobs read -----------------------------------------------------------------------


def prepare(case: Case, work: Path) -> Inputs:
    """Write the checkpoint, the text and the windows of a case, or find them as they are."""
    model = DEMO
    if case.shape.name != "demo":
        model = work / f"{case.shape.name}-{case.shape.layers}-layers-{case.device}"
        if not (model / "config.json").exists():
            # A process of its own, since torch would grow this one.
            script = ROOT / "benchmarks" / "shapes.py"
            options = ["--layers", str(case.shape.layers), "--device", case.device]
            words = [sys.executable, str(script), case.shape.name, str(model), *options]
            subprocess.run(words, check=True)
    windows, length = (case.windows, case.length) if case.calibrated else UNUSED_WINDOWS
    text = write_text(windows * length, work)
    ids = work / f"windows-{windows}x{length}.npy"
    return Inputs(model, text, ids, export_windows(ids, text, windows, length))


def write_text(tokens: int, work: Path) -> Path:
    """Return a text of so many tokens: the bundled one, or its paragraphs shuffled and repeated."""
    bundled = TEXT.read_text(encoding="utf-8")
    wanted = tokens * CHARACTERS_PER_TOKEN
    if wanted <= len(bundled):
        return TEXT
    path = work / f"text-{tokens}-tokens.txt"
    if not path.exists():
        paragraphs, order, drawn = bundled.split("\n\n"), random.Random(0), 0
        parts: list[str] = []
        while drawn < wanted:
            order.shuffle(paragraphs)
            parts.append("\n\n".join(paragraphs))
            drawn += len(parts[-1])
        path.write_text("\n\n".join(parts)[:wanted], encoding="utf-8")
    return path


def export_windows(path: Path, text: Path, windows: int, length: int) -> str:
    """Write token windows as quantkit's own loader cuts them; return their sha256.

    Raises:
        SystemExit: the text does not hold so many.
    """
    note = path.with_suffix(".json")
    if not note.exists():
        code = f"""
import json, numpy
from pathlib import Path
from quantkit.calibration.data import load_tokenizer, load_windows

windows = load_windows(
    {str(text)!r}, split="train", text_column="text",
    tokenizer=load_tokenizer(Path({str(DEMO)!r})),
    samples={windows}, sequence_length={length}, seed=0)
numpy.save({str(path)!r}, windows.ids)
found = {{"sha256": windows.sha256, "windows": len(windows.ids)}}
Path({str(note)!r}).write_text(json.dumps(found))
"""
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    found = json.loads(note.read_text())
    if found["windows"] != windows:
        raise SystemExit(f"{text} holds {found['windows']} windows of {windows}")
    return str(found["sha256"])


# --- the jobs ---------------------------------------------------------------------------------


def our_command(case: Case, inputs: Inputs, output: Path) -> list[str]:
    """Return the command of quantkit's job."""
    settings = {
        "quantize.scheme": case.scheme,
        "quantize.method": case.method,
        "quantize.effort": case.effort,
    }
    if case.calibrated:
        settings |= {
            "calibration.data": str(inputs.text),
            "calibration.samples": str(case.windows),
            "calibration.sequence_length": str(case.length),
        }
    words = [sys.executable, "-m", "quantkit", "quantize", "--recipe", "demo"]
    words += ["--model", str(inputs.model), "--output", str(output), "--device", case.device]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    words += [] if case.memory is None else ["--memory", case.memory]
    return [*words, "--no-gate", "--quiet"]


def run_job(case: Case, tool: str, inputs: Inputs, options: Options, runs: Runs) -> None:
    """Run one job of one tool, check what it left, and take that away again."""
    output = options.work / f"{case.name}-{tool}"
    shutil.rmtree(output, ignore_errors=True)
    command = our_command(case, inputs, output)
    if tool == RIVAL:
        assert options.rival is not None
        words = ["--method", case.method, "--scheme", RIVAL_SCHEMES[case.scheme]]
        command = rival_command(RIVAL, options.rival, inputs.model, inputs.windows, output, words)
    log = options.work / f"{case.name}-{tool}.log"
    measured = run_measured(command, log, gpu=case.device == "cuda")
    if tool == OURS:
        check_same_windows(output, inputs.sha256)
        evidence = json.loads((output / "quantkit.json").read_text(encoding="utf-8"))
        runs.timings.append(evidence["timings"])
        runs.dtype = evidence["compute"]["dtype"]
    written = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    if not written:
        raise SystemExit(f"{case.name}: {tool} left no weights in {output}; see {log}")
    runs.artifact_bytes[tool] = written
    runs.measured.setdefault(tool, []).append(measured)
    shutil.rmtree(output)
    print(
        f"{case.name}: {tool} {measured.seconds:.1f} s, {measured.peak_bytes / 1e6:.0f} MB",
        file=sys.stderr,
        flush=True,
    )


def warm_up(tiny: Case, tools: Sequence[str], options: Options) -> None:
    """Let each tool do a small job once, after which Python has compiled what it imports."""
    inputs = prepare(tiny, options.work)
    for tool in tools:
        run_job(replace(tiny, name=f"{tiny.name}-warm-up"), tool, inputs, options, Runs())


def run_case(case: Case, options: Options) -> dict[str, Any]:
    """Run a case as often as it is wanted, the tools in turns; return its entry of the results."""
    inputs, runs = prepare(case, options.work), Runs()
    contest = options.rival is not None and case.has_rival
    if case.shape.name != "tiny":
        warm_up(case.tiny(), (RIVAL, OURS) if contest else (OURS,), options)
    for repeat in range(options.repeats):
        if case.calibrated:
            runs.speeds.append(probe_speed(case.device, options.probe_seconds))
        if contest and repeat < options.rival_repeats:
            run_job(case, RIVAL, inputs, options, runs)
        run_job(case, OURS, inputs, options, runs)
    return describe_case(case, inputs, options, runs)


def describe_case(case: Case, inputs: Inputs, options: Options, runs: Runs) -> dict[str, Any]:
    """Put an entry of the results together."""
    work = count_work(case.shape, case.windows, case.length) if case.calibrated else None
    return summarize(
        case,
        runs.measured,
        None if work is None else asdict(work),
        runs.speeds,
        {
            "weight_bytes": sum(path.stat().st_size for path in inputs.model.glob("*.safetensors")),
            "artifact_bytes": runs.artifact_bytes,
            "timings": runs.timings,
            "dtype": runs.dtype,
            "machine": {**describe_machine(), **describe_gpu(case.device)},
            "environment": {
                name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ
            },
            "versions": package_versions(PACKAGES),
            "rival_versions": None
            if options.rival is None or not case.has_rival
            else rival_versions(RIVAL, options.rival),
            "commit": describe_commit(),
            "command": describe_command(case, options),
        },
    )


def describe_command(case: Case, options: Options) -> str:
    """Return the command that measures this case again, without the folders of this machine."""
    words = ["python", "benchmarks/run.py", case.name, "--repeats", str(options.repeats)]
    if options.rival_repeats != options.repeats:
        words += ["--rival-repeats", str(options.rival_repeats)]
    if not case.whole:
        words += ["--layers", str(case.shape.layers)]
    if case.device != CASES[case.name].device:
        words += ["--device", case.device]
    if case.has_rival and options.rival is None:
        words.append("--alone")
    return shlex.join(words)


def describe_gpu(device: str) -> dict[str, str]:
    """Return the first visible GPU's name and memory; nothing of a job on the processor."""
    if device != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    query = ["nvidia-smi", f"--id={visible}", "--query-gpu=name,memory.total"]
    done = subprocess.run(
        [*query, "--format=csv,noheader"], check=True, capture_output=True, text=True
    )
    return {"gpu": done.stdout.strip()}


# --- the command line -------------------------------------------------------------------------


def choose_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for, shortened, moved or shrunk.

    Raises:
        SystemExit: --layers does not fit one of them.
    """
    chosen: list[Case] = []
    for name in arguments.cases:
        case: Case = CASES[name]
        if arguments.layers is not None and not arguments.tiny:
            case = case.shortened(arguments.layers)
        if arguments.tiny:
            case = case.tiny()
        if arguments.device not in (None, case.device):
            # What is promised of a GPU is not promised of a processor.
            case = replace(case, device=arguments.device, promises=Promises())
        chosen.append(case)
    return chosen


def find_contestant(arguments: argparse.Namespace, cases: list[Case]) -> Path | None:
    """Return the rival's interpreter where a case needs it.

    Raises:
        SystemExit: there is none, and --alone was not given.
    """
    if arguments.alone or not any(case.has_rival for case in cases):
        return None
    return find_rival(RIVAL, arguments.rival).absolute()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rival-repeats", type=int, help="runs of the rival, where fewer")
    parser.add_argument("--rival", type=Path, help="the interpreter of llm-compressor")
    parser.add_argument("--alone", action="store_true", help="run quantkit without the rival")
    parser.add_argument("--layers", type=int, help="measure the first blocks of the model only")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="another than the case's own")
    parser.add_argument("--work", type=Path, help="keep checkpoints and logs in this folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--tiny", action="store_true", help="try the harness on a model of 3 MB")
    parser.add_argument("--prepare", action="store_true", help="write what the jobs read, and end")
    parser.add_argument("--render", action="store_true", help="make the tables again, and end")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.cases) - CASES.keys())
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}: use {', '.join(CASES)}")
    if arguments.render == bool(arguments.cases):
        parser.error("name at least one case, or give --render alone")
    if arguments.tiny and arguments.results.resolve() == RESULTS:
        parser.error("--tiny measures nothing worth keeping: give another folder with --results")
    if min(arguments.repeats, arguments.rival_repeats or 1) < 1:
        parser.error("--repeats and --rival-repeats must be at least 1")
    return arguments


def main() -> int:
    """Run the cases and keep their results; 1 where a promise is not met."""
    arguments = parse_arguments()
    results: Path = arguments.results.absolute()
    if arguments.render:
        render_again(results)
        return 0
    cases = choose_cases(arguments)
    rival = None if arguments.prepare else find_contestant(arguments, cases)
    work = arguments.work.absolute() if arguments.work else None
    os.chdir(ROOT)

    entries: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(
            repeats=arguments.repeats,
            rival_repeats=arguments.rival_repeats or arguments.repeats,
            rival=rival,
            work=work or Path(scratch),
            probe_seconds=0.0 if arguments.tiny else PROBE_SECONDS,
        )
        options.work.mkdir(parents=True, exist_ok=True)
        for case in cases:
            if arguments.prepare:
                prepare(case, options.work)
                continue
            entries.append(run_case(case, options))
            # At once: what comes later may fail or be stopped.
            keep_result(results, entries[-1])
    states = [promise["state"] for entry in entries for promise in entry["promises"]]
    return int("not met" in states)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SystemExit as stopped:
        if not isinstance(stopped.code, str):
            raise
        print(stopped.code, file=sys.stderr)
        sys.exit(2)
