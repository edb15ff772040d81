"""What comparisons with other tools share: the same token windows, one judge, versions.

A contestant may be any tool: it gets windows as .npy and leaves a folder that transformers loads.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import ROOT

RECIPE = "demo"
PACKAGES = ("quantkit", "torch", "transformers", "compressed-tensors")
RIVAL_ENVIRONMENTS = {"llm-compressor": ".venv-rival", "auto-round": ".venv-auto-round"}
"""Tool -> the folder in which scripts/setup_rival.sh puts its environment."""
RIVAL_PACKAGES = {
    "llm-compressor": ("llmcompressor", "torch", "transformers", "compressed-tensors"),
    "auto-round": ("auto-round", "torch", "transformers", "compressed-tensors"),
}


def find_rival(tool: str, given: Path | None = None) -> Path:
    """Return the interpreter of a rival's environment.

    Raises:
        SystemExit: there is none.
    """
    python = given or ROOT / RIVAL_ENVIRONMENTS[tool] / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"no {python}: run scripts/setup_rival.sh {tool} first")
    return python


def rival_versions(tool: str, python: Path) -> dict[str, str]:
    """Return the versions in the rival's environment."""
    code = f"""
import importlib.metadata, json
print(json.dumps({{name: importlib.metadata.version(name) for name in {RIVAL_PACKAGES[tool]!r}}}))
"""
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


# --- windows ----------------------------------------------------------------------------------


def export_windows(
    folder: Path, calibration_samples: int | None = None, evaluation_samples: int | None = None
) -> dict[str, Any]:
    """Write calibration.npy and evaluation.npy as quantkit's own loader cuts them.

    A process of its own, because torch in this one would count towards every measured command.

    Args:
        folder: where the two files go.
        calibration_samples: windows, where not as many as the recipe says.
        evaluation_samples: the same for the evaluation.

    Returns:
        `model`: the recipe's; `calibration` and `evaluation`: the sha256 and shape of the ids.
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
for name, spec, order, samples in (
    ("calibration", recipe.calibration, "random", {calibration_samples!r}),
    ("evaluation", recipe.gate, "sequential", {evaluation_samples!r}),
):
    windows = load_windows(
        spec.data, split=spec.split, text_column=spec.text_column, tokenizer=tokenizer,
        samples=samples or spec.samples, sequence_length=spec.sequence_length, seed=spec.seed,
        order=order)
    numpy.save({str(folder)!r} + f"/{{name}}.npy", windows.ids)
    hashes[name] = {{"sha256": windows.sha256, "shape": list(windows.ids.shape)}}
print(json.dumps(hashes))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_same_windows(output: Path, expected: str) -> None:
    """Make sure that quantkit's job calibrated on the windows that the rival got."""
    evidence = json.loads((output / "quantkit.json").read_text(encoding="utf-8"))
    calibration = evidence["calibration"]
    if calibration is not None and calibration["sha256"] != expected:
        raise SystemExit("quantkit calibrated on other windows than those of the rival")


# --- the judge --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What the judge found on the evaluation windows."""

    kl: float
    """Mean over all positions of KL(baseline || artifact) over the whole vocabulary, in nats."""
    perplexity: float
    baseline_perplexity: float
    agreement: float
    weight_bytes: int


def artifact_of(tool: str, output: Path) -> Path:
    """Return the checkpoint folder inside a job's output."""
    return output / "compressed-tensors" if tool == "quantkit" else output


def judge(
    model: Path,
    artifact: Path,
    evaluation: Path,
    windows: int | None = None,
    runtime: str = "transformers",
) -> Judged:
    """Measure an artifact with the judge of quantkit's gate.

    Args:
        model: folder of the 16-bit checkpoint.
        artifact: folder of the artifact.
        evaluation: .npy, int64 [N, T].
        windows: only so many of the first windows.
        runtime: what the artifact runs in.
    """
    import numpy as np

    from quantkit.judging.evaluate import evaluate
    from quantkit.records import TokenWindows

    ids = np.load(evaluation)[:windows]
    weights = np.ones(ids.shape, dtype=np.float32)
    result = evaluate(model, artifact, TokenWindows(ids, weights, "benchmark", ""), runtime=runtime)
    return Judged(
        kl=statistics.fmean(result.kl),
        perplexity=math.exp(statistics.fmean(result.candidate_nll)),
        baseline_perplexity=math.exp(statistics.fmean(result.baseline_nll)),
        agreement=statistics.fmean(result.agreement),
        weight_bytes=sum(path.stat().st_size for path in artifact.glob("*.safetensors")),
    )


def describe_versions(versions: dict[str, str]) -> str:
    """Return `name version, name version`."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def rival_command(
    tool: str, python: Path, model: Path, calibration: Path, output: Path, options: Sequence[str]
) -> list[str]:
    """Return the command of a rival's job."""
    script = ROOT / "benchmarks" / f"{tool.replace('-', '_')}_job.py"
    files = ["--model", str(model), "--windows", str(calibration), "--output", str(output)]
    return [str(python), str(script), *files, *options]
