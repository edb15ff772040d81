"""`type: auto` against llama.cpp's mixes: the same size, types chosen by measured divergence.

For each mix one job writes the file with the mix's types and one lets quantkit choose them, its
`target_bits` being the bits per weight of the first file. Both are judged in llama.cpp on the same
windows.

usage: python benchmarks/gguf_auto.py [--models demo ...] [--types Q4_K_M Q3_K_M Q2_K]
           [--work artifacts/gguf-auto]
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf_quality import EVALUATION, MODELS, make_recipe
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

TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
CANDIDATES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
PACKAGES = ("quantkit", "torch", "transformers", "xllamacpp")


@dataclass(frozen=True)
class Made:
    """One file. cpu_seconds: of the processor, for the whole job."""

    contestant: str
    file: Path
    bits_per_weight: float
    cpu_seconds: float


@dataclass(frozen=True)
class Row:
    """One file as it was judged."""

    model: str
    mix: str
    contestant: str
    file_bytes: int
    bits_per_weight: float
    kl: float
    kl_low: float
    kl_high: float
    perplexity: float
    cpu_seconds: float


def run_job(model: Path, output: Path, export: dict[str, Any], contestant: str) -> Made:
    """Run one job from the command line."""
    recipe = output.with_suffix(".json")
    document = make_recipe(model, output, "Q8_0", "normal").model_dump(mode="json")
    recipe.write_text(json.dumps({**document, "export": [{"format": "gguf", **export}]}))
    words = f"quantize --recipe {shlex.quote(str(recipe))} --no-gate --overwrite --device cpu"
    command = [sys.executable, "-m", "quantkit", *shlex.split(words)]
    measured = run_measured(command, output.with_suffix(".log"))
    evidence = json.loads((output / "quantkit.json").read_text(encoding="utf-8"))
    (file,) = (path for path in (output / "gguf").glob("*.gguf") if path.name != "imatrix.gguf")
    bits = float(evidence["artifacts"][0]["bits_per_weight"])
    return Made(contestant, file, bits, measured.cpu_seconds)


def compete(model: Path, mixes: list[str], work: Path) -> Iterator[tuple[str, Made]]:
    """Make both files of each mix."""
    for mix in mixes:
        fixed = run_job(model, work / f"mix-{mix}", {"type": mix}, f"the mix {mix}")
        yield mix, fixed
        export = {
            "type": "auto",
            "target_bits": fixed.bits_per_weight,
            "candidates": list(CANDIDATES),
        }
        yield mix, run_job(model, work / f"auto-{mix}", export, "type: auto")


def judge(name: str, model: Path, made: list[tuple[str, Made]], output: Path) -> list[Row]:
    """Measure all files of one model on the same windows."""
    files = [each.file for _, each in made]
    report = quantkit.compare(
        model,
        files,
        data=EVALUATION,
        output=output,
        overwrite=True,
        device="cpu",
        footprint=False,
    )
    rows = []
    for (mix, each), found in zip(made, report.artifacts, strict=True):
        kl, perplexity = found.judgement.kl, found.judgement.perplexity
        assert kl is not None
        assert perplexity is not None
        size = each.file.stat().st_size
        rows.append(
            Row(
                name,
                mix,
                each.contestant,
                size,
                each.bits_per_weight,
                kl.value,
                kl.low,
                kl.high,
                perplexity.value,
                each.cpu_seconds,
            )
        )
    return rows


def render(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "| model | size of | made by | MB | bits/weight | KL, nats | of the mix's | PPL | CPU, s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        mix = next(each for each in rows if (each.model, each.mix) == (row.model, row.mix))
        lines.append(
            f"| {row.model} | {row.mix} | {row.contestant} | {row.file_bytes / 1e6:.2f} "
            f"| {row.bits_per_weight:.3f} | {row.kl:.5f} | {row.kl / mix.kl:.3f} "
            f"| {row.perplexity:.3f} | {row.cpu_seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the contest and write its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["demo"])
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "gguf-auto")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.models:
        model = ensure_model(name, arguments.work / "models")
        work = arguments.work / name
        work.mkdir(parents=True, exist_ok=True)
        made = list(compete(model, arguments.types, work))
        rows += judge(name, model, made, work / "comparison")
    command = shlex.join(["python", "benchmarks/gguf_auto.py", *sys.argv[1:]])
    document = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "versions": package_versions(PACKAGES),
        "command": command,
        "rows": [asdict(row) for row in rows],
    }
    foot = f"commit {describe_commit()}; command: `{command}`\n"
    write_results("gguf_auto", document, f"{render(rows)}\n\n{foot}")


if __name__ == "__main__":
    main()
