"""Every shipped recipe does its whole job, through the real command, on the bundled model; those
for encoders on a tiny one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.formats.inspect import inspect_artifact
from quantkit.recipe import AUTO, ExportSpec, Recipe, load_recipe, shipped_recipes
from tests.encoder_models import write_encoder_checkpoint

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "models" / "demo-llama"
# A few windows are enough to run every stage; with so few the limits of the recipe would be
# INCONCLUSIVE, so they are set aside here. `make demo` judges at full size.
FEW_WINDOWS = {
    "gate.samples": 8,
    "gate.sequence_length": 128,
    "gate.max_perplexity_increase": "100%",
    "gate.max_kl": 1,
    "gate.min_top1_agreement": "50%",
}
FEW_CALIBRATION_WINDOWS = {"calibration.samples": 8, "calibration.sequence_length": 128}
# The same for texts, which hold the limits of the recipe.
FEW_TEXTS = {"calibration.samples": 32, "gate.samples": 64, "gate.sequence_length": 64}
ENCODERS = ("onnx-int8-encoder",)
# One of each runtime; the others would be asked the same.
PROBED = ("demo", "gguf-q4", "onnx-int4")


def settings_of(name: str) -> dict[str, object]:
    """What makes a recipe small."""
    if name in ENCODERS:
        return dict(FEW_TEXTS)
    probes = {"gate.probes.max_new_tokens": 8} if name in PROBED else {"gate.probes": "null"}
    if load_recipe(name).calibration is None:
        return FEW_WINDOWS | probes
    return FEW_WINDOWS | FEW_CALIBRATION_WINDOWS | probes


def run_recipe(name: str, model: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """`quantkit quantize MODEL --recipe NAME` in `folder`, offline."""
    settings = settings_of(name)
    words = [sys.executable, "-m", "quantkit", "quantize", str(model), "--recipe", name, "--json"]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return subprocess.run(
        [*words, "--quiet"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def schemes_of(recipe: Recipe, export: ExportSpec) -> tuple[str, ...]:
    """One of these is in the artifact."""
    if export.format == "gguf":
        return (str(export.type),)
    if export.format == "onnx":
        return (str(export.precision),)
    spec = recipe.quantize
    return spec.candidates if spec.scheme == AUTO else (spec.scheme,)


@pytest.mark.recipes
@pytest.mark.parametrize("name", [path.stem for path in shipped_recipes()])
def test_shipped_recipe_quantizes_and_passes_from_any_folder(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By its name alone, in a folder without recipes or data: an artifact, a PASS, a report."""
    recipe = load_recipe(name)
    model = MODEL
    if name in ENCODERS:
        model = write_encoder_checkpoint(tmp_path_factory.mktemp("model") / "encoder")

    done = run_recipe(name, model, tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert recipe.output is not None
    output = tmp_path / recipe.output
    report = json.loads((output / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "PASS"
    for export in recipe.export:
        inspection = inspect_artifact(output / export.format)
        assert any(scheme in str(inspection) for scheme in schemes_of(recipe, export))
    assert [path.name for path in tmp_path.iterdir()] == [Path(recipe.output).parts[0]]


def test_shipped_recipes_begin_with_a_summary_and_name_their_own_output() -> None:
    """What `recipes list` shows comes from the first line; two recipes never share a folder."""
    first_lines = [path.read_text(encoding="utf-8").splitlines()[0] for path in shipped_recipes()]
    outputs = [load_recipe(path).output for path in shipped_recipes()]

    assert all(line.startswith("# ") and len(line) < 100 for line in first_lines)
    assert None not in outputs
    assert len(set(outputs)) == len(outputs)
