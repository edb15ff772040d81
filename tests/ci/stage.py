"""A runner's folder: the step script, its variables and the files that it fills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cli.running import ROOT
from tests.helpers import make_pico_model, pico_text

STEPS = ROOT / "ci" / "steps.sh"
GITHUB_TOKEN = "ghs_tokenOfTheRun"
HF_TOKEN = "hf_tokenThatIsNotToBeSeen"

RECIPE = """\
version: 1
model: model
output: out
calibration: {data: calibration.txt, samples: 4, sequence_length: 32}
quantize: {scheme: w8a16, group_size: 32, method: rtn}
gate:
  data: evaluation.txt
  samples: 8
  sequence_length: 32
  probes: {max_new_tokens: 8}
  max_perplexity_increase: 900%
  max_kl: 9
  min_top1_agreement: 0
"""


@dataclass(frozen=True)
class Stage:
    """The folder of one run, and the step script that it runs."""

    folder: Path
    steps: Path = STEPS

    @property
    def seen(self) -> str:
        """What the processes of quantkit could read of their environment."""
        path = self.folder / "seen.txt"
        return path.read_text() if path.exists() else ""

    @property
    def summary(self) -> str:
        """What the page of the run shows."""
        return (self.folder / "summary.md").read_text()

    @property
    def outputs(self) -> dict[str, str]:
        """The outputs of the step."""
        lines = (self.folder / "outputs.txt").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def run(self, step: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one step as GitHub does; names of variables as in the environment."""
        github = {
            "GITHUB_ACTIONS": "true",
            "GITHUB_STEP_SUMMARY": str(self.folder / "summary.md"),
            "GITHUB_OUTPUT": str(self.folder / "outputs.txt"),
            "RUNNER_TEMP": str(self.folder / "temp"),
        }
        return self.run_plainly(step, github | variables)

    def run_plainly(
        self, step: str, variables: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run one step with nothing but `variables` and what a shell needs."""
        kept = ("HOME", "TMPDIR", "OMP_NUM_THREADS", "QUANTKIT_CACHE", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "127.0.0.1",
            "GITHUB_TOKEN": GITHUB_TOKEN,
            **variables,
        }
        return subprocess.run(
            ["bash", str(self.steps), step],
            cwd=self.folder / "checkout",
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def pull_request(self, api: str, number: int = 7) -> dict[str, str]:
        """Return the variables of a run for a pull request."""
        event = self.folder / "event.json"
        event.write_text(json.dumps({"pull_request": {"number": number}}))
        return {
            "GITHUB_EVENT_PATH": str(event),
            "GITHUB_API_URL": api,
            "GITHUB_REPOSITORY": "acme/models",
        }


def make_stage(folder: Path) -> Stage:
    """Make a runner's folder: a checkout with a recipe and texts, and quantkit on the PATH.

    The command notes what it is given of the environment, and is the real one.
    """
    checkout, programs = folder / "checkout", folder / "bin"
    checkout.mkdir()
    programs.mkdir()
    (checkout / "recipe.yaml").write_text(RECIPE)
    (checkout / "calibration.txt").write_text(pico_text(1000, seed=1))
    (checkout / "evaluation.txt").write_text(pico_text(1500, seed=2))
    command = programs / "quantkit"
    command.write_text(
        f'#!/bin/sh\nenv >>"{folder / "seen.txt"}"\nexec "{sys.executable}" -m quantkit "$@"\n'
    )
    command.chmod(0o755)
    return Stage(folder)


def add_model(stage: Stage, model: Path | None = None) -> None:
    """Put the recipe's model into the checkout: a copy of one, or a new pico model."""
    target = stage.folder / "checkout" / "model"
    if model is None:
        make_pico_model(target)
    else:
        shutil.copytree(model, target)
