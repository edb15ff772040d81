"""The stages of the unattended run on a GPU machine, without running any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES

from tests.cli.running import ROOT

SCRIPT = ROOT / "scripts" / "measure_gpu.sh"
TINY = ("--device", "cpu", "--tiny")


def run(*words: str, rival: str = "none") -> subprocess.CompletedProcess[str]:
    """Run the script with this interpreter as quantkit's."""
    environment = {**os.environ, "QUANTKIT_PYTHON": sys.executable, "RIVAL_PYTHON": rival}
    environment.pop("OUT", None)
    command = [str(SCRIPT), *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def stages(output: str) -> list[str]:
    """The names that a dry run prints."""
    return [line.split(",")[0] for line in output.splitlines() if ", about " in line]


def test_a_dry_run_names_the_stages() -> None:
    """The rival's are left out where there is none, and that is said."""
    alone = run("--dry-run")
    assert alone.returncode == 0, alone.stderr
    names = stages(alone.stdout)
    assert names[:3] == ["tests", "write-8b", "gptq-8b"]
    assert {name for name, case in CASES.items() if case.device == "cuda"} <= set(names)
    assert "quantkit is measured alone" in alone.stdout
    against = run("--dry-run", "--full-rival", rival=sys.executable)
    assert stages(against.stdout) == [*names, "gptq-8b-4-blocks", "gptq-8b-rival"]


def test_what_would_take_too_long_is_left_for_the_next_call(tmp_path: Path) -> None:
    """With an exit code of its own."""
    done = run(*TINY, "--minutes", "0", "--work", str(tmp_path))
    assert done.returncode == 75, done.stderr
    left = next(line for line in done.stdout.splitlines() if "measure_gpu: left" in line)
    assert left.split(": ")[2].split() == stages(run("--dry-run").stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("1", 1)])
def test_what_is_done_is_not_done_again(tmp_path: Path, code: str, expected: int) -> None:
    """And a promise that was not kept is still told."""
    (tmp_path / "done").mkdir()
    for name in stages(run("--dry-run").stdout):
        (tmp_path / "done" / name).write_text("0")
    (tmp_path / "done" / "gptq-8b").write_text(code)
    done = run(*TINY, "--minutes", "0", "--work", str(tmp_path))
    assert done.returncode == expected, done.stdout
    assert ("failed or not kept: gptq-8b" in done.stdout) == bool(expected)
    again = run(*TINY, "--minutes", "0", "--work", str(tmp_path), "--again")
    assert again.returncode == 75


def test_results_of_earlier_calls_are_handed_over(tmp_path: Path) -> None:
    """Also by a call in which nothing is left to do."""
    (tmp_path / "work" / "results").mkdir(parents=True)
    (tmp_path / "work" / "results" / "performance.json").write_text("{}")
    words = ("--minutes", "0", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "to"))
    assert run(*TINY, *words).returncode == 75
    assert (tmp_path / "to" / "performance.json").read_text() == "{}"


@pytest.mark.parametrize("words", [("--what",), ("--device", "cpu"), ("--minutes",)])
def test_a_wrong_call_is_refused(words: tuple[str, ...]) -> None:
    """Before any stage."""
    done = run(*words)
    assert done.returncode == 2
    assert "measure_gpu: " in done.stderr
