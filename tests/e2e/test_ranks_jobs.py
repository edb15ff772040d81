"""Whole jobs by two processes, against the same jobs by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.errors import InputError
from quantkit.formats.gguf.container import open_gguf, read_tensor_rows
from quantkit.recipe import Recipe
from tests.helpers import pico_text
from tests.pico_jobs import make_pico_job
from tests.rank_jobs import Outcome, run_jobs

pytestmark = pytest.mark.ranks

JOBS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "awq": {"scheme": "w4a16", "method": "awq+gptq", "group_size": 32, "kv_cache": "fp8"},
        "static": {"scheme": "w8a8_static", "method": "smoothquant+gptq"},
        "gguf": {"scheme": "none", "method": "gptq"},
    }
)
GGUF = ({"format": "gguf", "type": "Q4_0"},)


@dataclass(frozen=True)
class Pair:
    """The folder with the outputs of one process (`one-NAME`) and of two (`two-NAME`).

    killed: what torchrun said when a process was killed, its exit code, and how long it lived
    after the last block was stored. refused: what one process was told that went on alone.
    """

    folder: Path
    outcomes: list[Outcome]
    killed: subprocess.CompletedProcess[str]
    seconds: float
    left: list[str]
    refused: str


def make_job(folder: Path, name: str, output: str, samples: int = 256) -> Recipe:
    """A job on the model in `folder`; of the name `killed` it is that of `awq`.

    One process walks its windows in two micro-batches: so do two, each with one of them.
    """
    quantize = JOBS["awq" if name == "killed" else name]
    recipe = make_pico_job(
        folder, GGUF if name == "gguf" else (), output=output, quantize=quantize
    ).model_dump(mode="json")
    recipe["calibration"]["samples"] = samples
    (folder / "calibration.txt").write_text(pico_text(8000, seed=1))
    return Recipe.model_validate(recipe)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("ranks")
    killed_job = make_job(folder, "killed", "two-killed")
    killed, seconds = kill_one(killed_job, folder)
    left = sorted(path.name for path in (folder / "two-killed.partial" / "workspace").iterdir())
    with pytest.raises(InputError) as refused:
        quantkit.quantize(killed_job, gate=False, device="cpu")
    few = make_job(folder, "awq", "two-few", samples=1)
    recipes = [make_job(folder, name, f"two-{name}") for name in JOBS]
    outcomes = run_jobs(folder, [few, killed_job, *recipes])
    for name in JOBS:
        quantkit.quantize(make_job(folder, name, f"one-{name}"), gate=False, device="cpu")
    return Pair(folder, outcomes, killed, seconds, left, str(refused.value))


def kill_one(recipe: Recipe, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Let torchrun start the command in two processes, of which the second is killed."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    command = ["-m", "tests.rank_jobs", "quantize", "--recipe", str(file), "--no-gate"]
    command += ["--output", str(recipe.output)]
    outcome = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", *command, "--device", "cpu"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ended = time.time()
    blocks = (folder / "two-killed.partial" / "workspace").glob("block-*")
    return outcome, ended - max(path.stat().st_mtime for path in blocks)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an artifact, as bytes where it has codes."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.rglob("*.gguf")):
        file = open_gguf(path)
        found |= {name: read_tensor_rows(file, name) for name in file.tensors}
    return found


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_find_what_one_finds(pair: Pair, name: str) -> None:
    """Up to the order in which floats are added: hardly a code may be another."""
    one, two = (read_tensors(pair.folder / f"{which}-{name}") for which in ("one", "two"))

    assert one
    assert one.keys() == two.keys()
    different = total = 0
    for key, mine in one.items():
        theirs = two[key]
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        if mine.dtype in (torch.bfloat16, torch.float32):
            assert torch.allclose(mine.float(), theirs.float(), rtol=0.02, atol=1e-6), key
            continue
        mine, theirs = (each.contiguous().view(torch.uint8) for each in (mine, theirs))
        different += int((mine != theirs).sum())
        total += mine.numel()
    assert different <= total / 1000


@torch.no_grad()
def test_the_divergence_from_the_original_is_the_same(pair: Pair, tmp_path: Path) -> None:
    for which in ("one", "two"):
        quantkit.convert(
            str(pair.folder / f"{which}-awq" / "compressed-tensors"),
            to="safetensors",
            output=tmp_path / which,
        )
    folders = (pair.folder / "model", tmp_path / "one", tmp_path / "two")
    ids = torch.arange(3, 259).reshape(4, 64)
    original, one, two = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.log_softmax(2)
        for folder in folders
    )

    def divergence(candidate: Tensor) -> float:
        return float((original.exp() * (original - candidate)).sum(2).mean())

    assert divergence(one) > 1e-4
    assert divergence(two) == pytest.approx(divergence(one), rel=0.01)


def test_the_first_process_alone_reports(pair: Pair) -> None:
    """The others end when they are not needed any more, and with the error's exit code."""
    first, second = pair.outcomes
    jobs = 1 + len(JOBS)

    assert first.endings[1:] == ["done"] * jobs
    assert second.endings == ["left 2", *["left 0"] * jobs]
    document = json.loads((pair.folder / "two-awq" / "quantkit.json").read_text())
    assert document["compute"]["processes"] == 2
    report = json.loads((pair.folder / "two-awq" / "report" / "report.json").read_text())
    assert [note for note in report["notes"] if "2 processes shared" in note]


def test_fewer_windows_than_processes_are_refused(pair: Pair) -> None:
    first, _ = pair.outcomes

    assert first.endings[0] == (
        "CalibrationError: 1 calibration windows cannot be shared by 2 processes: raise "
        "calibration.samples to 2 or more, or start fewer processes"
    )
    assert not list(pair.folder.glob("two-few*"))


def test_a_killed_process_ends_the_job(pair: Pair) -> None:
    """At once, with what is solved, and without any output."""
    assert pair.killed.returncode != 0
    assert pair.seconds < 10
    assert "error: " in pair.killed.stderr
    assert "the same command goes on" in pair.killed.stderr
    assert not pair.killed.stdout
    assert {name.split("-")[0] for name in pair.left} == {"block", "job.json"}


def test_a_resumed_job_ends_in_the_same_bytes(pair: Pair) -> None:
    resumed, whole = (
        pair.folder / f"two-{name}" / "compressed-tensors" for name in ("killed", "awq")
    )

    for path in whole.rglob("*.safetensors"):
        assert (resumed / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_another_number_of_processes_does_not_go_on(pair: Pair) -> None:
    assert "differs in compute (processes 2 -> 1)" in pair.refused
