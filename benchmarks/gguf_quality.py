"""Quality of GGUF files at the same size: quantkit against llama.cpp with its importance matrix.

Both start from the same checkpoint and the same calibration windows. llama.cpp gets the importance
matrix of the original model on them and quantizes by its own `llama_model_quantize`, from a BF16
file, in an environment that has llama-cpp-python (`scripts/setup_rival.sh llama-cpp-python`). One
judge measures all files: quantkit's gate, in the real llama.cpp, on the same evaluation windows.
Files of one type hold tensors of the same types, so they have the same size; that is checked.

usage: python benchmarks/gguf_quality.py [--models demo outlier qwen3] [--types Q4_K_M ...]
           [--efforts fast normal best] [--work artifacts/gguf-quality]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from measure import (
    ROOT,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)
from quality_models import ensure_model

import quantkit
from quantkit.calibration.data import load_tokenizer
from quantkit.calibration.walk import GroupStop, walk
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.source import resolve_source
from quantkit.formats.gguf.container import open_gguf
from quantkit.formats.gguf.model import open_model
from quantkit.ggml_types import FILE_TYPES
from quantkit.job import plan_job
from quantkit.job_windows import load_calibration
from quantkit.recipe import Recipe

MODELS = ("demo", "outlier", "qwen3")
TYPES = ("Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
EFFORTS = ("fast", "normal", "best")
TARGET = 0.85
"""Of llama.cpp's KL, at effort normal."""
CALIBRATION = ROOT / "calib_data" / "docs_calibration.txt"
EVALUATION = ROOT / "calib_data" / "docs_evaluation.txt"
WINDOWS, LENGTH = 128, 512
PACKAGES = ("quantkit", "torch", "transformers", "gguf", "xllamacpp")


@dataclass(frozen=True)
class Row:
    """One file. seconds: of the processor, for the whole job."""

    model: str
    type: str
    contestant: str
    file_bytes: int
    kl: float
    kl_low: float
    kl_high: float
    perplexity: float
    agreement: float
    cpu_seconds: float


def make_recipe(model: Path, output: Path, file_type: str, effort: str) -> Recipe:
    """One job for one file."""
    return Recipe.model_validate(
        {
            "version": 1,
            "model": str(model),
            "output": str(output),
            "calibration": {
                "data": str(CALIBRATION),
                "samples": WINDOWS,
                "sequence_length": LENGTH,
            },
            "quantize": {"effort": effort},
            "export": [{"format": "gguf", "type": file_type}],
            "gate": {
                "data": str(EVALUATION),
                "max_kl": None,
                "max_perplexity_increase": None,
                "min_top1_agreement": None,
            },
        }
    )


def measure_importance(model: Path, target: Path) -> None:
    """Store the mean squares of the original model's inputs, by the names of a GGUF file."""
    checkpoint = open_checkpoint(resolve_source(str(model)))
    recipe = make_recipe(model, target, "Q8_0", "normal")
    plan = plan_job(recipe, checkpoint)
    assert recipe.calibration is not None
    windows = load_calibration(
        recipe.calibration, load_tokenizer(checkpoint.source.folder), checkpoint, plan
    )
    names = {each.source: each.name for each in open_model(checkpoint).tensors}
    found = {}
    for stop in walk(
        build_skeleton(checkpoint),
        plan.blocks,
        lambda block: _read(checkpoint, f"{block.prefix}."),
        lambda: _read(checkpoint, "model.embed_tokens."),
        windows,
        device=torch.device("cpu"),
        dtype=torch.float32,
        needs_stats=lambda block, group: True,
    ):
        assert isinstance(stop, GroupStop)
        assert stop.stats is not None
        for linear in stop.group.linears:
            found[names[f"{linear.name}.weight"]] = stop.stats.second_moment.diagonal().numpy()
    np.savez(target, allow_pickle=False, **found)


def _read(checkpoint: Checkpoint, prefix: str) -> dict[str, torch.Tensor]:
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    return {name: read_tensor(checkpoint, name) for name in names}


def run_llama_cpp(python: Path, source: Path, result: Path, file_type: str, matrix: Path) -> float:
    """Let llama.cpp quantize `source`; return the processor's seconds."""
    job = ROOT / "benchmarks" / "llama_quantize_job.py"
    number = str(FILE_TYPES[file_type].number)
    command: list[str | Path] = [python, job, source, result, number, matrix]
    measured = run_measured(command, result.with_suffix(".log"))
    return measured.cpu_seconds


def run_quantkit(model: Path, output: Path, file_type: str, effort: str) -> tuple[Path, float]:
    """Run one job from the command line; return its file and the processor's seconds."""
    recipe = output.with_suffix(".json")
    document = make_recipe(model, output, file_type, effort).model_dump(mode="json")
    recipe.write_text(json.dumps(document))
    words = f"quantize --recipe {shlex.quote(str(recipe))} --no-gate --overwrite --device cpu"
    command = [sys.executable, "-m", "quantkit", *shlex.split(words)]
    measured = run_measured(command, output.with_suffix(".log"))
    (file,) = (path for path in (output / "gguf").glob("*.gguf") if path.name != "imatrix.gguf")
    return file, measured.cpu_seconds


def compete(
    name: str, model: Path, arguments: argparse.Namespace, work: Path
) -> Iterator[tuple[str, str, Path, float]]:
    """Make every file of one model; yield type, contestant, file and seconds."""
    matrix, plain = work / "importance.npz", work / "bf16"
    measure_importance(model, matrix)
    quantkit.convert(model, to="gguf:BF16", output=plain, overwrite=True)
    (source,) = plain.glob("*.gguf")
    for file_type in arguments.types:
        result = work / f"llama.cpp-{file_type}.gguf"
        seconds = run_llama_cpp(arguments.llama_cpp, source, result, file_type, matrix)
        yield file_type, "llama.cpp, importance matrix", result, seconds
        kinds = {each.name: each.kind for each in open_gguf(result).tensors.values()}
        for effort in arguments.efforts:
            output = work / f"quantkit-{file_type}-{effort}"
            file, seconds = run_quantkit(model, output, file_type, effort)
            found = {each.name: each.kind for each in open_gguf(file).tensors.values()}
            if found != kinds:
                raise SystemExit(f"{name} {file_type}: the files hold other types of tensors")
            yield file_type, f"quantkit, effort {effort}", file, seconds


def judge(
    name: str, model: Path, made: list[tuple[str, str, Path, float]], output: Path
) -> list[Row]:
    """Measure all files of one model on the same windows."""
    report = quantkit.compare(
        model,
        [file for _, _, file, _ in made],
        data=EVALUATION,
        output=output,
        overwrite=True,
        device="cpu",
        footprint=False,
    )
    rows = []
    for (file_type, contestant, file, seconds), found in zip(made, report.artifacts, strict=True):
        judgement = found.judgement
        assert judgement.kl is not None
        assert judgement.perplexity is not None
        assert judgement.top1_agreement is not None
        rows.append(
            Row(
                name,
                file_type,
                contestant,
                file.stat().st_size,
                judgement.kl.value,
                judgement.kl.low,
                judgement.kl.high,
                judgement.perplexity.value,
                judgement.top1_agreement.value,
                seconds,
            )
        )
    return rows


def render(rows: list[Row]) -> str:
    """The tables in Markdown, one a model."""
    lines: list[str] = []
    for model in dict.fromkeys(row.model for row in rows):
        lines += [
            f"## {model}",
            "",
            "| type | size, MB | made by | KL, nats | of llama.cpp's | PPL | top-1 | CPU, s |",
            "|---|---:|---|---:|---:|---:|---:|---:|",
        ]
        for row in (row for row in rows if row.model == model):
            rival = next(each for each in rows if (each.model, each.type) == (model, row.type))
            lines.append(
                f"| {row.type} | {row.file_bytes / 1e6:.2f} | {row.contestant} | {row.kl:.5f} "
                f"| {row.kl / rival.kl:.3f} | {row.perplexity:.3f} | {row.agreement:.2%} "
                f"| {row.cpu_seconds:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--types", nargs="+", choices=tuple(FILE_TYPES), default=TYPES)
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=EFFORTS)
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "gguf-quality")
    parser.add_argument("--results", default="gguf_quality", help="name of the files in results/")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=ROOT / ".venv-llama-cpp-python" / "bin" / "python",
        help="the interpreter that has llama-cpp-python",
    )
    return parser.parse_args()


def main() -> None:
    """Run the contest and write its results."""
    arguments = parse_arguments()
    rows: list[Row] = []
    for name in arguments.models:
        model = ensure_model(name, arguments.work / "models")
        work = arguments.work / name
        work.mkdir(parents=True, exist_ok=True)
        made = list(compete(name, model, arguments, work))
        found = judge(name, model, made, work / "comparison")
        rows += found
        print(render(found), flush=True)
    version = subprocess.run(
        [arguments.llama_cpp, "-c", "import llama_cpp; print(llama_cpp.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    command = shlex.join(["python", "benchmarks/gguf_quality.py", *sys.argv[1:]])
    document = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "versions": package_versions(PACKAGES) | {"llama-cpp-python": version},
        "command": command,
        "target": TARGET,
        "rows": [asdict(row) for row in rows],
    }
    foot = f"llama-cpp-python {version}; commit {describe_commit()}; command: `{command}`\n"
    write_results(arguments.results, document, f"{render(rows)}\n{foot}")


if __name__ == "__main__":
    main()
