"""Real trainings with the callback beside the same ones without, by the example of the docs."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import make_pico_model, pico_text

pytestmark = pytest.mark.integrations

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = [str(ROOT / "examples" / "finetune_and_quantize.py")]
SMALL_GATE = [
    *("--set", "gate.samples=8", "--set", "gate.sequence_length=64"),
    *("--set", "gate.probes=null"),
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEPS = 6


def train(output: Path, *words: str, launcher: Sequence[str] = ()) -> tuple[Path, Path]:
    """Run the example without quantkit and with it, at once; return the last checkpoints.

    Args:
        words: options of both.
    """
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    running = []
    for name, more in (("plain", ["--recipe", "none"]), ("with", SMALL_GATE)):
        place = output / name
        command = [sys.executable, *launcher, *EXAMPLE, "--output", str(place), *words, *more]
        environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}.db"
        with (output / f"{name}.log").open("w") as log:
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    codes = [process.wait() for process in running]
    assert codes == [0, 0], [path.read_text()[-3000:] for path in sorted(output.glob("*.log"))]
    last = f"training/checkpoint-{STEPS}"
    return output / "plain" / last, output / "with" / last


def read_log(checkpoint: Path) -> list[dict[str, Any]]:
    """What the Trainer has logged up to a checkpoint."""
    rows: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text())[
        "log_history"
    ]
    return rows


def is_same(first: Any, second: Any) -> bool:
    """Whether two states are the same, to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            is_same(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_same, first, second))
    return bool(first == second)


def assert_same_training(plain: Path, other: Path) -> None:
    """Losses, rates, gradients, weights, optimizer, schedule and random numbers are the same."""
    losses = [row for row in read_log(plain) if "loss" in row]
    assert len(losses) == STEPS
    assert losses == [row for row in read_log(other) if "loss" in row]
    weights = "model.safetensors"
    assert (plain / weights).read_bytes() == (other / weights).read_bytes()
    states = sorted(path.name for path in (*plain.glob("*.pt"), *plain.glob("*.pth")))
    assert {"optimizer.pt", "scheduler.pt"} < set(states)
    for name in states:
        first, second = (torch.load(each / name, weights_only=False) for each in (plain, other))
        assert is_same(first, second), name


def test_a_training_is_the_same_and_mlflow_has_the_figures(tmp_path: Path) -> None:
    """The demo model is quantized at two steps; MLflow keeps its runs in a SQLite file."""
    plain, quantized = train(tmp_path, "--report-to", "mlflow")
    assert_same_training(plain, quantized)
    with sqlite3.connect(tmp_path / "with.db") as runs:
        rows = runs.execute("select key, step, value from metrics").fetchall()
        (state,) = runs.execute("select status from runs").fetchall()
    assert state == ("FINISHED",)
    found = {(key, step): value for key, step, value in rows}
    logged = {(row["step"], key): row[key] for row in read_log(quantized) for key in row}
    assert {step for key, step in found if key == "loss"} == set(range(1, STEPS + 1))
    for key in (
        *("kl", "perplexity", "perplexity_baseline", "perplexity_increase", "top1_agreement"),
        *("size_bytes", "bits_per_weight", "passed", "failed", "seconds"),
    ):
        steps = [step for name, step in found if name == f"quantkit/{key}"]
        assert steps == [3, 6], key
        for step in steps:
            assert found[f"quantkit/{key}", step] == pytest.approx(logged[step, f"quantkit/{key}"])
    output = tmp_path / "with" / "quantized"
    document = json.loads((output / "training.json").read_text())
    kept = [row["folder"] for row in document["steps"] if row["kept"]]
    assert len(document["steps"]) == 2
    assert len(kept) == 1
    report = json.loads((output / kept[0] / "report" / "report.json").read_text())
    step = int(kept[0].removeprefix("step-"))
    assert report["artifacts"][0]["metrics"]["kl"]["mean"] == logged[step, "quantkit/kl"]
    # The checkpoints that were written for the jobs are gone.
    left = {path.name for path in output.iterdir()} - {"best"}
    assert left == {"training.json", "step-3.log", "step-6.log", *kept}


def test_two_processes_train_the_same_and_one_quantizes(tmp_path: Path) -> None:
    """By torchrun, with gloo."""
    plain, quantized = train(tmp_path, "--every", str(STEPS), launcher=TORCHRUN)
    assert_same_training(plain, quantized)
    (row,) = (row for row in read_log(quantized) if "quantkit/kl" in row)
    assert (row["step"], row["quantkit/failed"]) == (STEPS, 0)
    assert (tmp_path / "with" / "quantized" / f"step-{STEPS}" / "quantkit.json").is_file()


MEETING = """
import sys, time
from datetime import timedelta
from pathlib import Path
from torch import distributed
from quantkit.integrations.meeting import Meeting

folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), 2
(folder / f"loaded-{rank}").touch()
while len(list(folder.glob("loaded-*"))) < size:
    time.sleep(0.01)
distributed.init_process_group(
    "gloo",
    init_method=(folder / "store").as_uri(),
    rank=rank,
    world_size=size,
    timeout=timedelta(seconds=3),
)
meeting = Meeting()
if meeting.leads:
    time.sleep(5)
found = meeting.share("done" if meeting.leads else None)
assert found == "done"
meeting.leave()
distributed.destroy_process_group()
"""


def test_the_others_wait_longer_than_collectives_do(tmp_path: Path) -> None:
    """Where the training's own group gives up after three seconds."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING, str(tmp_path), str(rank)],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], said


RECIPE = """\
version: 1
quantize: {scheme: w4a16, group_size: 32, method: rtn}
gate:
  data: evaluation.txt
  samples: 8
  sequence_length: 32
  max_kl: 0.000001
  probes: null
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pico model and a recipe whose limit no artifact keeps."""
    monkeypatch.chdir(tmp_path)
    make_pico_model(tmp_path / "model")
    Path("recipe.yaml").write_text(RECIPE)
    Path("evaluation.txt").write_text(pico_text(900, 2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make_trainer(callbacks: list[Any], steps: int) -> Any:
    """A Trainer of the pico model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    ids = list(range(3, 35))
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained("model"),
        args=TrainingArguments(
            *("trained",),
            max_steps=steps,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 16,
        processing_class=AutoTokenizer.from_pretrained("model"),
        callbacks=callbacks,
    )


def kill_child(log: Path) -> None:
    """Kill the job that writes `log` as soon as it has begun."""
    while not log.exists():
        time.sleep(0.01)
    while True:
        for task in Path(f"/proc/{os.getpid()}/task").iterdir():
            children = (task / "children").read_text().split()
            for child in children:
                words = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"quantize" in words and b"step-2" in words:
                    os.kill(int(child), signal.SIGKILL)
                    return
        time.sleep(0.01)


def test_no_job_harms_the_training(folder: Path) -> None:
    """One fails its gate, one is killed, and for one there is no room on the disk."""
    from transformers import TrainerCallback

    from quantkit.integrations import QuantizeCallback

    class Faults(TrainerCallback):
        """What goes wrong from the second step on."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 1:
                threading.Thread(target=kill_child, args=[Path("out/step-2.log")]).start()
            if state.global_step == 2:
                most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))

    plain = make_trainer([], 3)
    plain.train()
    callback = QuantizeCallback("recipe.yaml", output="out", every_steps=1, device="cpu")
    trainer = make_trainer([Faults(), callback], 3)
    trainer.train()
    losses, others = (
        [row["loss"] for row in each.state.log_history if "loss" in row]
        for each in (plain, trainer)
    )
    assert losses == others
    first, second, third = callback.milestones
    assert (first.verdict, first.figures["passed"], first.figures["failed"]) == ("FAIL", 0, 0)
    assert first.figures["kl"] > 0
    assert "killed by SIGKILL" in str(second.error)
    assert "no space left" in str(third.error)
    failed = [
        row["quantkit/failed"] for row in trainer.state.log_history if "quantkit/failed" in row
    ]
    assert failed == [0, 1, 1]
    assert callback.best is None
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"step-1", "step-1.log", "step-2.log", "training.json"}


def test_a_recipe_that_does_not_fit_stops_before_the_first_step(folder: Path) -> None:
    """By the shapes of the model, of which nothing is left behind."""
    from quantkit.errors import InputError
    from quantkit.integrations import QuantizeCallback

    pair = "quantize.group_size=128"
    callback = QuantizeCallback("recipe.yaml", output="out", overrides=[pair], device="cpu")
    trainer = make_trainer([callback], 1)
    with pytest.raises(InputError) as caught:
        trainer.train()
    assert "does not divide in_features 64" in str(caught.value)
    assert trainer.state.global_step == 0
    assert [path.name for path in Path("out").iterdir()] == ["rehearsal.log"]
