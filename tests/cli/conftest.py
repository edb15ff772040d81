"""A small model, its texts and a recipe that the command-line tests share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import make_pico_model, pico_text

RECIPE = """\
version: 1
model: model
output: out
calibration: {data: calibration.txt, samples: 8, sequence_length: 32}
quantize: {scheme: w4a16, group_size: 32, method: awq+gptq}
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
class Bench:
    """A folder to work in, with a recipe that passes until something is spoilt."""

    folder: Path
    model: Path
    calibration: Path
    evaluation: Path

    @property
    def recipe(self) -> Path:
        """The recipe; its output is `out`."""
        return self.folder / "recipe.yaml"

    @property
    def output(self) -> Path:
        """What a job writes."""
        return self.folder / "out"


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of a random Llama: enough to be stopped in the middle."""
    return make_pico_model(tmp_path_factory.mktemp("pico") / "model", layers=4)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of model in two files with an index."""
    return make_pico_model(tmp_path_factory.mktemp("sharded") / "model", shards=2)


@pytest.fixture
def bench(pico: Path, tmp_path: Path) -> Bench:
    """A fresh folder with its own copy of the model."""
    return make_bench(tmp_path, pico)


def make_bench(folder: Path, model: Path) -> Bench:
    """Copy `model` into `folder` and write texts and a recipe beside it."""
    shutil.copytree(model, folder / "model")
    made = Bench(folder, folder / "model", folder / "calibration.txt", folder / "evaluation.txt")
    made.calibration.write_text(pico_text(1500, seed=1))
    made.evaluation.write_text(pico_text(1500, seed=2))
    made.recipe.write_text(RECIPE)
    return made
