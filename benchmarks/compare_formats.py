"""One comparison over formats and makers, and what the runtimes add to it of their own.

One job of quantkit writes the demo model as compressed-tensors, GGUF (Q4_K_M and Q8_0) and ONNX;
llm-compressor makes its W4A16, and llama.cpp its own Q4_K_M with the same importance matrix.
`quantkit.compare` measures all of them on the same tokens, each in its own runtime, with load time,
memory and speed.

Then each artifact is taken apart into two steps, from the original in transformers to its exact
weights in transformers, and from there to its own runtime. The second step is the runtime's alone.
It is held against the *floor* of the runtime, which is measured with the model that is not
quantized: as a float graph in ONNX Runtime, in transformers against itself, and in llama.cpp as
F32, F16, Q8_0 and Q6_K. llama.cpp rounds the inputs of quantized matrices to eight bits, in blocks
of 32 for Q8_0 and of 256 for K-quants; of these two types the floor is again the step from the
file's exact weights in transformers to the file in llama.cpp, so that it holds no error of weights.

Two bounds must hold for each artifact, or the exit code is 1:

- noise: the mean KL of the second step is at most 1.25 times the floor (the same arithmetic on
  other weights does not round alike in every digit);
- triangle: the square roots of the mean KL from the original, in the runtime and of the exact
  weights in transformers, differ by no more than the square root of that. For small divergences
  the root of KL is a distance, so whatever is further apart was not explained by the runtime.

usage: python benchmarks/compare_formats.py [--windows 32] [--length 256]
           [--llm-compressor PYTHON] [--llama-cpp PYTHON] [--work artifacts/compare-formats]
  The two interpreters come from `scripts/setup_rival.sh llm-compressor` and `... llama-cpp-python`.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from contest import (
    check_same_windows,
    describe_versions,
    export_windows,
    find_rival,
    rival_command,
    rival_versions,
)
from measure import (
    ROOT,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)

import quantkit
from quantkit.calibration.data import load_tokenizer
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.formats.gguf.imatrix import read_imatrix
from quantkit.formats.onnx.decoder import write_float_decoder
from quantkit.job_windows import load_evaluation
from quantkit.judging.evaluate import evaluate
from quantkit.records import ArtifactReport, Footprint, Report, TokenWindows

MODEL = ROOT / "models" / "demo-llama"
EVALUATION = ROOT / "calib_data" / "docs_evaluation.txt"
CALIBRATION_WINDOWS = 32
RECIPE = "onnx-int4"
EXPORTS = (
    "[{format: compressed-tensors}, {format: gguf, type: Q4_K_M}, {format: gguf, type: Q8_0}, "
    "{format: onnx}]"
)
FILE_TYPE = "15"
"""llama.cpp's number of Q4_K_M."""

MARGIN = 1.25
ROUNDING = 1e-9
"""KL of float32 sums in another order, at the most: what a floor of zero allows."""

FLOAT = "transformers"
FLOORS: Mapping[str, tuple[str, str]] = {
    "transformers, float32": (FLOAT, ""),
    "ONNX Runtime, float graph": ("onnxruntime", ""),
    "llama.cpp, F32": ("llama.cpp", "F32"),
    "llama.cpp, F16": ("llama.cpp", "F16"),
    "llama.cpp, Q8_0": ("llama.cpp", "Q8_0"),
    "llama.cpp, Q6_K": ("llama.cpp", "Q6_K"),
}
"""Floor -> runtime, and the type of the GGUF file of the model that is not quantized."""

PACKAGES = (
    "quantkit",
    "torch",
    "transformers",
    "compressed-tensors",
    "onnxruntime",
    "onnxruntime-genai",
    "xllamacpp",
)


@dataclass(frozen=True)
class Contestant:
    """An artifact, where its exact weights are from, and the floor of the kernels it runs in."""

    name: str
    path: Path
    weights: Path
    floor: str

    @property
    def runtime(self) -> str:
        """What it must be judged in."""
        return FLOORS[self.floor][0]


@dataclass(frozen=True)
class Floor:
    """What a runtime adds of its own to the model that is not quantized."""

    name: str
    kl: float
    """Mean KL of the exact weights in transformers to the same file in the runtime."""
    weights_kl: float
    """Mean KL of the original to these weights, both in transformers: zero for float."""


@dataclass(frozen=True)
class Row:
    """One artifact."""

    name: str
    format: str
    runtime: str
    size_bytes: int
    bits_per_weight: float
    kl: float
    kl_low: float
    kl_high: float
    perplexity: float
    on_front: bool
    footprint: Footprint | None
    weights_kl: float
    """Of its exact weights in transformers."""
    noise: float
    """Mean KL of its exact weights in transformers to itself in its runtime."""
    floor: str


# --- the artifacts ------------------------------------------------------------------------------


def make_contestants(arguments: argparse.Namespace, work: Path) -> list[Contestant]:
    """Make every artifact."""
    windows = export_windows(work, CALIBRATION_WINDOWS)
    ours = run_quantkit(work / "quantkit", windows["calibration"])
    theirs = work / "llm-compressor-W4A16"
    shutil.rmtree(theirs, ignore_errors=True)
    python = find_rival("llm-compressor", arguments.llm_compressor)
    command = rival_command(
        "llm-compressor", python, MODEL, work / "calibration.npy", theirs, ["--method", "gptq"]
    )
    run_measured(command, theirs.with_suffix(".log"))
    packed, k_quant, eight = (
        ours / "compressed-tensors",
        ours / "gguf" / "Q4_K_M" / "demo-llama-Q4_K_M.gguf",
        ours / "gguf" / "Q8_0" / "demo-llama-Q8_0.gguf",
    )
    rival = run_llama_cpp(arguments.llama_cpp, work, k_quant.with_name("imatrix.gguf"))
    return [
        Contestant("quantkit, compressed-tensors", packed, packed, "transformers, float32"),
        Contestant("quantkit, GGUF Q4_K_M", k_quant, k_quant, "llama.cpp, Q6_K"),
        Contestant("quantkit, GGUF Q8_0", eight, eight, "llama.cpp, Q8_0"),
        # The graph has the codes of the compressed-tensors artifact; its noise would show others.
        Contestant("quantkit, ONNX INT4", ours / "onnx", packed, "ONNX Runtime, float graph"),
        Contestant("llm-compressor, W4A16", theirs, theirs, "transformers, float32"),
        Contestant("llama.cpp, GGUF Q4_K_M", rival, rival, "llama.cpp, Q6_K"),
    ]


def run_quantkit(output: Path, calibration: Mapping[str, Any]) -> Path:
    """Run the job from the command line; return its folder."""
    samples, length = calibration["shape"]
    words = [sys.executable, "-m", "quantkit", "quantize", str(MODEL), "--recipe", RECIPE]
    for setting in (
        f"calibration.samples={samples}",
        f"calibration.sequence_length={length}",
        f"export={EXPORTS}",
    ):
        words += ["--set", setting]
    words += ["--no-gate", "--overwrite", "--quiet", "--device", "cpu", "--output", str(output)]
    run_measured(words, output.with_suffix(".log"))
    check_same_windows(output, calibration["sha256"])
    return output


def run_llama_cpp(python: Path, work: Path, matrix: Path) -> Path:
    """Let llama.cpp quantize the model with the importance matrix of quantkit's job."""
    source = make_plain(work, "BF16")
    result, importance = work / "llama.cpp-Q4_K_M.gguf", work / "importance.npz"
    imatrix = read_imatrix(matrix)
    found = {}
    for name, entry in imatrix.entries.items():
        values = imatrix.find_importance(name, entry.sums.shape[-1])
        if values is not None:
            found[name] = values.flatten().numpy()
    np.savez(importance, allow_pickle=False, **found)
    job = ROOT / "benchmarks" / "llama_quantize_job.py"
    command: list[str | Path] = [python, job, source, result, FILE_TYPE, importance]
    run_measured(command, result.with_suffix(".log"))
    return result


def make_plain(work: Path, file_type: str) -> Path:
    """Convert the model that is not quantized into a GGUF file."""
    output = work / f"plain-{file_type}"
    quantkit.convert(MODEL, to=f"gguf:{file_type}", output=output, overwrite=True)
    return output / f"{MODEL.name}-{file_type}.gguf"


def take_weights(path: Path, output: Path) -> Path:
    """Write the exact weights of an artifact in float32 for transformers."""
    base = MODEL if path.suffix == ".gguf" else None
    quantkit.convert(
        path, to="safetensors", dtype="float32", base=base, output=output, overwrite=True
    )
    return output


# --- measuring ----------------------------------------------------------------------------------


def compare_all(
    contestants: Sequence[Contestant], arguments: argparse.Namespace, output: Path
) -> Report:
    """Compare all artifacts in one run, on as many windows each.

    Raises:
        SystemExit: one was not measured, or in another runtime or on other windows than it should.
    """
    count = arguments.windows
    report = quantkit.compare(
        MODEL,
        [each.path for each in contestants],
        data=EVALUATION,
        output=output,
        overrides=settings(count, arguments.length),
        device="cpu",
        overwrite=True,
    )
    for contestant, row in zip(contestants, report.artifacts, strict=True):
        judgement = row.judgement
        if judgement.kl is None:
            raise SystemExit(f"{contestant.name} was not measured: {judgement.reasons}")
        if row.runtime != contestant.runtime or judgement.windows != count:
            raise SystemExit(
                f"{contestant.name} was judged in {row.runtime} on {judgement.windows} windows"
            )
    return report


def settings(windows: int, length: int) -> tuple[str, ...]:
    """The gate's: all windows at the first look."""
    return (
        f"gate.samples={windows}",
        f"gate.max_samples={windows}",
        f"gate.sequence_length={length}",
    )


def load_windows(arguments: argparse.Namespace) -> TokenWindows:
    """Return the windows of the comparison."""
    pairs = settings(arguments.windows, arguments.length)
    recipe = quantkit.load_recipe(RECIPE, overrides=[*pairs, f"gate.data={EVALUATION}"])
    assert recipe.gate is not None
    checkpoint = open_checkpoint(resolve_source(str(MODEL)))
    return load_evaluation(recipe.gate, load_tokenizer(checkpoint.source.folder), checkpoint)


def mean_kl(baseline: Path, candidate: Path, windows: TokenWindows, runtime: str = FLOAT) -> float:
    """Return the mean KL of a folder in transformers to what a runtime makes of an artifact."""
    result = evaluate(baseline, candidate, windows, runtime=runtime, device="cpu")
    return fmean(result.kl)


def measure_floor(name: str, windows: TokenWindows, work: Path) -> Floor:
    """Measure what a runtime adds to the model that is not quantized."""
    runtime, file_type = FLOORS[name]
    if runtime == FLOAT:
        return Floor(name, mean_kl(MODEL, MODEL, windows), 0.0)
    if runtime == "onnxruntime":
        folder = work / "float"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_float_decoder(open_checkpoint(resolve_source(str(MODEL))), folder)
        return Floor(name, mean_kl(MODEL, folder, windows, runtime), 0.0)
    file = make_plain(work, file_type)
    if file_type.startswith("F"):
        return Floor(name, mean_kl(MODEL, file, windows, runtime), 0.0)
    weights = take_weights(file, work / f"weights-{file_type}")
    return Floor(name, mean_kl(weights, file, windows, runtime), mean_kl(MODEL, weights, windows))


def measure(
    contestant: Contestant,
    found: ArtifactReport,
    report: Report,
    windows: TokenWindows,
    work: Path,
) -> Row:
    """Take an artifact apart into its weights and its runtime."""
    judgement = found.judgement
    assert judgement.kl is not None
    assert judgement.perplexity is not None
    weights = take_weights(contestant.weights, work / "weights")
    return Row(
        name=contestant.name,
        format=found.format,
        runtime=found.runtime,
        size_bytes=found.size_bytes,
        bits_per_weight=found.bits_per_weight,
        kl=judgement.kl.value,
        kl_low=judgement.kl.low,
        kl_high=judgement.kl.high,
        perplexity=judgement.perplexity.value,
        on_front=is_on_front(found, report),
        footprint=judgement.footprint,
        weights_kl=mean_kl(MODEL, weights, windows),
        noise=mean_kl(weights, contestant.path, windows, contestant.runtime),
        floor=contestant.floor,
    )


def is_on_front(found: ArtifactReport, report: Report) -> bool:
    """Whether no other artifact is at least as small and as close, and better in one of both."""
    costs = [
        (each.size_bytes, each.judgement.kl.value)
        for each in report.artifacts
        if each.judgement.kl is not None
    ]
    assert found.judgement.kl is not None
    own = (found.size_bytes, found.judgement.kl.value)
    return not any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in costs)


def find_violations(rows: Sequence[Row], floors: Mapping[str, Floor]) -> list[str]:
    """Return one sentence for each bound that does not hold."""
    found = []
    for row in rows:
        most = max(MARGIN * floors[row.floor].kl, ROUNDING)
        if not row.noise <= most:
            found.append(f"{row.name}: its runtime adds {row.noise:.3g}, and {most:.3g} is allowed")
        apart = abs(math.sqrt(row.kl) - math.sqrt(row.weights_kl))
        if not apart <= math.sqrt(most):
            found.append(
                f"{row.name}: the roots of both KL are {apart:.3g} apart, and "
                f"{math.sqrt(most):.3g} is allowed"
            )
    return found


# --- the whole run ------------------------------------------------------------------------------


def render(
    rows: Sequence[Row], floors: Mapping[str, Floor], report: Report, names: Mapping[str, str]
) -> str:
    """The tables in Markdown."""
    lines = [
        "| artifact | runtime | size, MB | bits/weight | KL, nats | PPL | front | load, s "
        "| memory, MB | prefill, tokens/s | decoding, tokens/s |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    size = report.baseline_bytes / 1e6
    taken = render_footprint(report.baseline_footprint)
    lines.append(f"| the original | transformers | {size:.2f} | 16 | 0 | | | {taken} |")
    for row in rows:
        lines.append(
            f"| {row.name} | {row.runtime} | {row.size_bytes / 1e6:.2f} | {row.bits_per_weight:.2f}"
            f" | {row.kl:.5f} ({row.kl_low:.5f} to {row.kl_high:.5f}) | {row.perplexity:.3f} "
            f"| {'yes' if row.on_front else 'no'} | {render_footprint(row.footprint)} |"
        )
    lines += ["", "Not told apart: " + (render_ties(report, names) or "none") + ".", ""]
    lines += [
        "| the model that is not quantized | floor, nats | KL of its weights, nats |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {floor.name} | {floor.kl:.2e} | {floor.weights_kl:.2e} |" for floor in floors.values()
    ]
    lines += [
        "",
        "| artifact | KL in its runtime | KL of its weights in transformers | difference "
        "| KL between both | floor | of the floor |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        floor = floors[row.floor]
        share = f"{row.noise / floor.kl:.3f}" if floor.kl else "none"
        difference = round(row.kl - row.weights_kl, 12)
        lines.append(
            f"| {row.name} | {row.kl:.6f} | {row.weights_kl:.6f} | {difference:.2e} "
            f"| {row.noise:.2e} | {floor.kl:.2e}: {floor.name} | {share} |"
        )
    return "\n".join(lines)


def render_footprint(footprint: Footprint | None) -> str:
    """Four cells of a table."""
    if footprint is None:
        return " | | | "
    memory = footprint.memory_bytes
    return (
        f"{footprint.load_seconds:.2f} | {'' if memory is None else f'{memory / 1e6:.0f}'} "
        f"| {footprint.prefill or 0:.0f} | {footprint.decoding or 0:.0f}"
    )


def render_ties(report: Report, names: Mapping[str, str]) -> str:
    """Name the pairs whose difference is not significant."""
    return "; ".join(
        f"{names[each.first]} and {names[each.second]}"
        for each in report.differences
        if not each.significant
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--llm-compressor", type=Path, help="the interpreter that has it")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=ROOT / ".venv-llama-cpp-python" / "bin" / "python",
        help="the interpreter that has llama-cpp-python",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "compare-formats")
    parser.add_argument("--results", default="compare_formats", help="name of the files")
    return parser.parse_args()


def main() -> int:
    """Make, compare, take apart; write the results."""
    arguments = parse_arguments()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    contestants = make_contestants(arguments, work)
    report = compare_all(contestants, arguments, work / "comparison")
    names = {
        row.name: contestant.name
        for row, contestant in zip(report.artifacts, contestants, strict=True)
    }
    windows = load_windows(arguments)
    floors = {name: measure_floor(name, windows, work) for name in FLOORS}
    rows = [
        measure(contestant, found, report, windows, work)
        for contestant, found in zip(contestants, report.artifacts, strict=True)
    ]
    violations = find_violations(rows, floors)
    python = find_rival("llm-compressor", arguments.llm_compressor)
    versions = package_versions(PACKAGES) | {
        name: version
        for name, version in rival_versions("llm-compressor", python).items()
        if name == "llmcompressor"
    }
    sizes = ["--windows", str(arguments.windows), "--length", str(arguments.length)]
    command = shlex.join(["python", "benchmarks/compare_formats.py", *sizes])
    document = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "versions": versions,
        "command": command,
        "windows": {"shape": list(windows.ids.shape), "sha256": windows.sha256},
        "rows": [asdict(row) for row in rows],
        "floors": [asdict(floor) for floor in floors.values()],
        "differences": [
            asdict(each) | {"first": names[each.first], "second": names[each.second]}
            for each in report.differences
        ],
        "baseline_footprint": report.baseline_footprint and asdict(report.baseline_footprint),
        "notes": list(report.notes),
        "violations": violations,
    }
    foot = (
        f"{arguments.windows} windows of {arguments.length} tokens; "
        f"{describe_machine()['processor']}, {describe_machine()['cores']} cores; "
        f"{describe_versions(versions)}; commit {describe_commit()}; command: `{command}`\n"
    )
    verdict = "\n".join(f"Violated: {each}." for each in violations) or "Both bounds hold for all."
    text = f"{render(rows, floors, report, names)}\n\n{verdict}\n\n{foot}"
    write_results(arguments.results, document, text)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
