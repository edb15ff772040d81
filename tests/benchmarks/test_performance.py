"""The harness: what is promised, what is kept, what the tables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run
from bound import BOUND_DTYPES
from cases import CASES, OURS, RIVAL, Case
from measure import RESULTS, Measured, run_measured
from performance_results import (
    BEGIN,
    END,
    PAGE,
    insert_tables,
    merge,
    read_results,
    summarize,
)
from performance_tables import label, render_page, render_tables

from tests.cli.running import ROOT

CIRCUMSTANCES = {
    "weight_bytes": 1_000_000_000,
    "artifact_bytes": {OURS: 300_000_000},
    "timings": [],
    "dtype": "float32",
    "machine": {"processor": "a processor", "cores": 2, "memory_gib": 24.0},
    "environment": {},
    "versions": {"quantkit": "1"},
    "rival_versions": {"llmcompressor": "2"},
    "commit": "0123456789ab",
    "command": "python benchmarks/run.py",
}
SPEED = {"float32": 1e11, "bfloat16": 4e11, "threads": 2, "device": ""}
WORK = {"forward": 600_000_000_000, "second_moments": 400_000_000_000}
"""Ten seconds at that speed in float32."""


def runs(*seconds: float, peak: int = 500, gpu: int | None = None) -> list[Measured]:
    """Runs of so many seconds."""
    return [Measured(value, peak, 2 * value, gpu) for value in seconds]


def entry(
    case: Case,
    ours: list[Measured],
    rival: list[Measured] | None = None,
    **circumstances: Any,
) -> dict[str, Any]:
    """A case's entry of the results."""
    measured = {OURS: ours} if rival is None else {RIVAL: rival, OURS: ours}
    work, speeds = (WORK, [SPEED]) if case.calibrated else (None, [])
    return summarize(case, measured, work, speeds, {**CIRCUMSTANCES, **circumstances})


def states(found: dict[str, Any]) -> dict[str, str]:
    """Promise -> what became of it."""
    return {promise["what"]: promise["state"] for promise in found["promises"]}


def test_medians_and_ratios() -> None:
    """Of the rival's median over ours, and of ours over the bound."""
    found = entry(CASES["gptq-0.5b"], runs(15, 14, 90), runs(60, 10, 61, peak=1000))
    assert found["tools"][OURS]["seconds"] == {"median": 15, "low": 14, "high": 90}
    assert found["tools"][RIVAL]["cpu_seconds"]["median"] == 120
    assert found["tools"][OURS]["device_peak_bytes"] is None
    assert found["comparison"] == {"speed_up": 4.0, "memory_share": 0.5}
    assert found["bound"]["seconds"] == {"float32": 10.0, "bfloat16": 2.5}
    assert found["bound"]["ratio"] == found["bound"]["ratios"]["float32"] == 1.5


def test_the_bound_on_a_gpu_is_that_of_bfloat16() -> None:
    """On the processor it is that of float32."""
    assert BOUND_DTYPES == {"cpu": "float32", "cuda": "bfloat16"}
    assert entry(CASES["gptq-8b"], runs(5))["bound"]["ratio"] == 2.0


def test_kept_promises_are_met() -> None:
    """At the limit they still are."""
    found = entry(CASES["gptq-0.5b"], runs(20), runs(60, peak=1000))
    assert states(found) == {"speed_up": "met", "memory_share": "met", "bound_ratio": "met"}
    assert states(entry(CASES["rtn-16gb"], runs(9, peak=3_000_000_000))) == {"memory_bytes": "met"}


def test_broken_promises_are_not() -> None:
    """Each on its own."""
    found = entry(CASES["gptq-0.5b"], runs(20.1, peak=501), runs(60, peak=1000))
    assert set(states(found).values()) == {"not met"}
    slow = entry(CASES["gptq-8b"], runs(121, gpu=24_000_000_001), runs(604))
    assert set(states(slow).values()) == {"not met"}
    assert "| 121 | **not met** |" in render_tables({"cases": [slow]})


def test_what_was_not_measured_is_not_judged() -> None:
    """Neither without the rival, nor by the whole model's limits on a part of it."""
    alone = states(entry(CASES["gptq-0.5b"], runs(20)))
    assert alone["speed_up"] == alone["memory_share"] == "not judged: the rival was not run"
    short = states(entry(CASES["gptq-8b"].shortened(4), runs(1, gpu=1), runs(9)))
    assert short["seconds"] == short["device_bytes"] == "not judged: the model is shortened"
    assert short["speed_up"] == "met"
    unseen = states(entry(CASES["gptq-8b"], runs(1)))
    assert unseen["device_bytes"] == "not judged: it was not measured"


def test_a_shortened_model_is_named_so_in_every_row() -> None:
    """Nobody takes it for the whole one."""
    found = entry(CASES["awq-0.5b"].shortened(3), runs(1), runs(9))
    name = "awq-0.5b, **only 3 of 24 blocks**"
    assert label(found) == name
    rows = [line for line in render_tables({"cases": [found]}).splitlines() if "awq" in line]
    assert len(rows) == 2 + 2 + 2  # runs, bound, promises
    assert all(row.startswith(f"| {name} |") for row in rows)
    with pytest.raises(SystemExit, match="--layers must be 1 to 24"):
        CASES["awq-0.5b"].shortened(25)
    with pytest.raises(SystemExit, match="measured whole"):
        CASES["awq-demo"].shortened(1)


def test_a_case_replaces_its_own_entry_only() -> None:
    """A part of its model, and another device, are other cases; the order is that of the table."""
    case = CASES["gptq-0.5b"]
    first = [
        entry(CASES["rtn-16gb"], runs(1)),
        entry(case.shortened(1), runs(2)),
        entry(case, runs(3)),
        entry(replace(case, device="cuda"), runs(4)),
    ]
    document: dict[str, Any] = {"cases": []}
    for each in first:
        document = merge(document, each)
    again = merge(document, entry(case, runs(5)))
    seconds = [each["tools"][OURS]["seconds"]["median"] for each in again["cases"]]
    assert seconds == [5, 4, 2, 1]


def test_tables_say_which_machine_they_are_of() -> None:
    """One after the other."""
    gpu = {**CIRCUMSTANCES["machine"], "gpu": "a GPU, 80 GiB"}  # type: ignore[dict-item]
    document = {
        "cases": [
            entry(CASES["gptq-0.5b"], runs(20)),
            entry(CASES["fp8-8b"], runs(20, gpu=7_000_000_000), machine=gpu),
        ]
    }
    tables = render_tables(document)
    assert tables.startswith("On a processor, 2 cores, 24.0 GiB:")
    assert "On a GPU, 80 GiB; a processor, 2 cores, 24.0 GiB:" in tables
    assert "| fp8-8b | quantkit | 1 | 20.0 | 40.0 | 0 | 7000 |  |  |" in tables
    page = render_page(document)
    assert "commit 0123456789ab" in page
    assert "64 calibration windows of 512 tokens" in page


def test_predictions_are_set_beside_what_came() -> None:
    """`calibrate` and `solve` are parts of another stage and are not counted twice."""
    timing = {
        "seconds": {"quantize": 8.0, "calibrate": 2.0, "solve": 5.0, "write": 1.0},
        "predicted": {
            "seconds": {"quantize": 6.0, "calibrate": 1.0, "solve": 4.0, "write": 1.0},
            "peak_memory_bytes": 400_000_000,
        },
    }
    found = entry(CASES["gptq-0.5b"], runs(20, peak=500_000_000), timings=[timing])
    assert "| gptq-0.5b | 7.0 | 9.0 | 400 | 500 |" in render_tables({"cases": [found]})


# --- what is kept in the repository -----------------------------------------------------------


def test_the_pages_are_made_from_the_results() -> None:
    """On a difference: `python benchmarks/run.py --render`."""
    document = read_results(RESULTS)
    assert (RESULTS / "performance.md").read_text(encoding="utf-8") == render_page(document)
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == render_tables(document)
    assert insert_tables(text, render_tables(document)) == text


def test_nothing_tiny_or_unnamed_is_kept() -> None:
    """Results are of the cases that there are, on their own shapes, and name no folder."""
    for found in read_results(RESULTS)["cases"]:
        assert found["shape"]["name"] == CASES[found["case"]].shape.name
        assert "--work" not in found["command"]


# --- the commands -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gptq"], "unknown case gptq: use gptq-demo"),
        ([], "name at least one case"),
        (["gptq-demo", "--tiny"], "give another folder"),
        (["gptq-demo", "--repeats", "0"], "at least 1"),
    ],
)
def test_a_wrong_command_is_refused(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is run."""
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit):
        run.main()
    assert message in capsys.readouterr().err


def test_a_contest_needs_a_rival(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise what is promised against it would pass unseen."""
    words = ["gptq-demo", "--rival", str(tmp_path / "python")]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit, match="setup_rival"):
        run.main()


def test_text_is_repeated_where_the_bundled_one_is_short(tmp_path: Path) -> None:
    """As much as is asked for, of the same paragraphs, the same every time."""
    assert run.write_text(1000, tmp_path) == run.TEXT
    tokens = 300_000
    path = run.write_text(tokens, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert len(text) == tokens * run.CHARACTERS_PER_TOKEN
    assert set(text.split("\n\n")[:100]) <= set(run.TEXT.read_text(encoding="utf-8").split("\n\n"))
    path.unlink()
    assert run.write_text(tokens, tmp_path).read_text(encoding="utf-8") == text


def test_a_failing_command_shows_the_end_of_its_log(tmp_path: Path) -> None:
    """And is not a measurement."""
    words = [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"]
    with pytest.raises(SystemExit, match=r"what went wrong\n\nfailed with exit code 3"):
        run_measured(words, tmp_path / "log")


def test_gpu_memory_is_what_a_command_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the numbers that nvidia-smi gives while it runs, in MiB."""
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\nfor used in 100 150 400 120; do echo $used; done\nexec sleep 60\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    words = [sys.executable, "-S", "-c", "import time; time.sleep(0.5)"]
    assert run_measured(words, tmp_path / "log", gpu=True).device_peak_bytes == 300 * 2**20
    assert run_measured([*words[:2], "-c", ""], tmp_path / "log").device_peak_bytes is None


@pytest.mark.slow
def test_a_tiny_case_from_the_command_to_the_tables(tmp_path: Path) -> None:
    """The way of every case, on a model of a megabyte; another case's entry stays."""
    results = tmp_path / "results"
    results.mkdir()
    kept = merge({"cases": []}, entry(CASES["rtn-8b"], runs(1)))
    (results / "performance.json").write_text(json.dumps(kept))
    words = [sys.executable, "benchmarks/run.py", "gptq-8b", "--device", "cpu", "--tiny", "--alone"]
    words += ["--repeats", "1", "--work", str(tmp_path / "work"), "--results", str(results)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, other = read_results(results)["cases"]
    assert other == kept["cases"][0]
    ours = found["tools"][OURS]
    assert ours["cpu_seconds"]["median"] > 0
    assert ours["peak_bytes"]["median"] > 10_000_000
    assert found["bound"]["operations_per_second"]["float32"]["median"] > 1e8
    assert found["timings"][0]["seconds"]["quantize"] > 0
    assert found["artifact_bytes"][OURS] > 100_000
    assert "gptq-8b, on the shape tiny, on cpu" in done.stdout
    assert "gptq-8b, on the shape tiny, on cpu" in (results / "performance.md").read_text()
    assert not (tmp_path / "work" / "gptq-8b-quantkit").exists()
