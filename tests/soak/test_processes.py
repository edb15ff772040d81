"""Whole jobs in processes of their own, at once: on one store of the baseline's answers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import COMMAND, environment
from tests.helpers import make_pico_model, pico_text
from tests.no_locks import can_forbid, forbid_locks

RECIPE = """\
version: 1
model: model
calibration: {data: calibration.txt, samples: 8, sequence_length: 32}
quantize: {scheme: w4a16, group_size: 32, method: gptq}
gate:
  data: evaluation.txt
  samples: 8
  sequence_length: 32
  max_perplexity_increase: 900%
  max_kl: 9
  min_top1_agreement: 0
"""


def start(folder: Path, output: str, before: Callable[[], None] | None) -> subprocess.Popen[str]:
    """Start a job in `folder`."""
    return subprocess.Popen(
        [*COMMAND, "quantize", "--recipe", "recipe.yaml", "--output", output],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=before,
    )


def read_metrics(output: Path) -> Any:
    """What the gate has measured; how long it took is another matter."""
    report = json.loads((output / "report" / "report.json").read_text())
    assert report["verdict"] == "PASS"
    return report["artifacts"][0]["metrics"]


@pytest.mark.soak
@pytest.mark.skipif(
    os.environ.get("QUANTKIT_TRUST") != "full", reason="half a minute for a few bytes: make soak"
)
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no-locks"])
def test_jobs_at_once_share_a_store(tmp_path: Path, own_store: Path, locks: bool) -> None:
    """Both finish, with the same results as one alone; without locks nothing is kept, and said."""
    if not locks and not can_forbid():
        pytest.skip("the number of flock is not known here")
    make_pico_model(tmp_path / "model", layers=1)
    (tmp_path / "calibration.txt").write_text(pico_text(900, seed=1))
    (tmp_path / "evaluation.txt").write_text(pico_text(900, seed=2))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before = None if locks else forbid_locks
    jobs = [start(tmp_path, output, before) for output in ("one", "two")]
    said = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    for text in said:
        assert ("cannot lock files: the file 'holder'" in text) is not locks
        assert ("cannot be locked, or another process holds its lock" in text) is not locks
    alone = start(tmp_path, "alone", None)
    words = alone.communicate()[0]
    assert alone.returncode == 0, words
    assert "damaged" not in "".join([*said, words])
    assert ("were not computed again" in words) is locks
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "two")
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "alone")
    weights = [
        (tmp_path / output / "compressed-tensors" / "model.safetensors").read_bytes()
        for output in ("one", "two", "alone")
    ]
    assert len(set(weights)) == 1
    assert not list(own_store.rglob("writing-*"))
