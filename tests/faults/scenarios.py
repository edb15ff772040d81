"""The commands that are broken, on the bundled model, each as small as it does all of its work."""

from __future__ import annotations

from pathlib import Path

from tests.cli.running import ROOT
from tests.faults.sweep import Beyond, Scenario

MODEL = "model"
GIVEN = ((ROOT / "models" / "demo-llama", MODEL),)
"""The bundled model lies beside the output, so that what is read of it can fail too."""
RECIPE = ("--recipe", str(ROOT / "recipes" / "demo.yaml"))
TEXT = ROOT / "tests" / "faults" / "calibration.txt"
"""Short: a third of the time of a job was for cutting the recipe's text into tokens."""
FEW = (
    "--set",
    f"calibration.data={TEXT}",
    "--set",
    "calibration.samples=2",
    "--set",
    "calibration.sequence_length=32",
    "--set",
    "quantize.method=gptq",
    "--set",
    "quantize.effort=fast",
)
"""Two windows, and a method that takes a tenth of a second a block."""
JUDGED = (
    "--set",
    "gate.samples=4",
    "--set",
    "gate.sequence_length=32",
    "--set",
    "gate.max_perplexity_increase=900%",
    "--set",
    "gate.max_kl=9",
    "--set",
    "gate.min_top1_agreement=0",
)


def quantize(*exports: str, overwrite: Path | None = None, name: str = "quantize") -> Scenario:
    """The demo job, without its gate; results are kept under `name`."""
    formats = ", ".join(exports)
    more = ("--set", f"export=[{formats}]")
    given = GIVEN if overwrite is None else (*GIVEN, (overwrite, "out"))
    return Scenario(
        name if overwrite is None else f"{name} --overwrite",
        (
            *("quantize", MODEL, *RECIPE, "--output", "out", "--no-gate", *FEW, *more),
            *(() if overwrite is None else ("--overwrite",)),
        ),
        "out",
        given,
        "block",
    )


def quantize_judged() -> Scenario:
    """The demo job with its gate."""
    words = ("quantize", MODEL, *RECIPE, "--output", "out", *FEW, *JUDGED)
    return Scenario("quantize with gate", words, "out", GIVEN, "block")


def calibrate() -> Scenario:
    """The statistics of a walk."""
    words = ("calibrate", MODEL, *RECIPE, "--output", "out", *FEW[:6])
    return Scenario("calibrate", words, "out", GIVEN, "statistics")


def convert(to: str) -> Scenario:
    """From the original to another format."""
    return Scenario(
        f"convert to {to}", ("convert", MODEL, "--to", to, "--output", "out"), "out", GIVEN
    )


def gate(artifact: Path) -> Scenario:
    """An artifact against the original, whose answers are kept in the store."""
    words = ("gate", str(artifact), "--baseline", MODEL, *RECIPE, "--output", "out", *JUDGED)
    return Scenario("gate", words, "out", GIVEN)


def compare(*artifacts: Path) -> Scenario:
    """Two artifacts against the original."""
    words = ("compare", MODEL, *map(str, artifacts), *RECIPE, "--output", "out", *JUDGED)
    return Scenario("compare", (*words, "--no-footprint"), "out", GIVEN)


def publish(output: Path, beyond: Beyond, repo: str) -> Scenario:
    """An output that passed, to a repository."""
    words = ("publish", "passed", "--repo", repo)
    return Scenario("publish", words, "passed", ((output, "passed"),), beyond=beyond)
