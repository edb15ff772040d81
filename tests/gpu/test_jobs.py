"""Whole jobs on a GPU: the bundled model as on a CPU, within the memory that the plan foretold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.gpu

MEASURED = """
import json, sys
import torch
import quantkit
from quantkit.cli.main import run
sys.argv = ["quantkit", *sys.argv[1:]]
code = 0
try:
    run()
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps([code, torch.cuda.max_memory_reserved()]))
"""
"""The command in a process that says afterwards what it took of the GPU's memory."""

ONE_RANK = """
import torch
from torch import distributed

store = distributed.HashStore()
distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
for device in ("cpu", "cuda"):
    tensor = torch.arange(5.0, device=device)
    distributed.all_reduce(tensor)
    distributed.broadcast(tensor, 0)
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
distributed.destroy_process_group()
print("summed")
"""
"""What `quantkit.ranks` asks of torch, for one process: NCCL for tensors on the GPU."""


def quantize(folder: Path, device: str, **settings: object) -> tuple[dict[str, Any], int]:
    """Return the report of the demo on a device, and the bytes that it took of a GPU."""
    words = ["quantize", "--recipe", "demo", "--output", str(folder), "--device", device]
    for key, value in settings.items():
        words += ["--set", f"{key.replace('__', '.')}={value}"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words, "--quiet"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    code, reserved = json.loads(done.stdout.splitlines()[-1])
    assert code in (0, None), done.stdout + done.stderr
    return json.loads((folder / "report" / "report.json").read_text("utf-8")), reserved


def test_the_demo_is_judged_as_on_a_cpu(cuda: torch.device, tmp_path: Path) -> None:
    """Each metric within the other's confidence interval, and the same verdict."""
    ours, reserved = quantize(tmp_path / "cuda", "cuda")
    theirs, _ = quantize(tmp_path / "cpu", "cpu")

    assert ours["evidence"]["compute"]["device"] == "cuda"
    assert ours["verdict"] == theirs["verdict"] == "PASS"
    for found, expected in zip(ours["artifacts"], theirs["artifacts"], strict=True):
        for name, metric in found["metrics"].items():
            bounds = expected["metrics"][name]
            centre = metric["increase"] if metric["increase"] is not None else metric["value"]
            assert bounds["low"] <= centre <= bounds["high"], name
    assert not [note for note in ours["notes"] if "kernels are not used" in note]
    predicted = ours["evidence"]["timings"]["predicted"]
    assert reserved <= predicted["device_memory_bytes"]


def test_a_job_on_a_gpu_is_the_same_every_time(cuda: torch.device, tmp_path: Path) -> None:
    """Down to the bytes of the tensors."""
    small = {"calibration__samples": 32, "gate": "null"}
    reports = [quantize(tmp_path / str(run), "cuda", **small)[0] for run in range(2)]
    files = [report["evidence"]["artifacts"][0]["files"] for report in reports]
    assert files[0] == files[1]


def test_kernels_do_not_change_the_verdict(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers lose the same within a hundredth, with the kernels and without."""
    small = {"calibration__samples": 32, "gate": "null"}
    ours, _ = quantize(tmp_path / "with", "cuda", **small)
    monkeypatch.setenv("QUANTKIT_KERNELS", "0")
    theirs, _ = quantize(tmp_path / "without", "cuda", **small)
    assert any("QUANTKIT_KERNELS is 0" in note for note in theirs["notes"])
    for found, expected in zip(ours["layers"], theirs["layers"], strict=True):
        assert found["relative_error"] == pytest.approx(expected["relative_error"], rel=0.01)


def test_one_rank_sums_over_nccl(cuda: torch.device) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip().endswith("summed"), done.stderr
