"""`quantkit sweep` with real jobs: side by side, run again, interrupted, on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Bench, make_bench
from tests.cli.running import COMMAND, ROOT, environment, run, run_here

SMALL = "quantize: {scheme: w4a16, group_size: 32, method: rtn}"

WITH_RAY = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
"""Ray may have been installed aside of the interpreter's own packages."""


def write_recipes(bench: Bench) -> None:
    """`good.yaml` passes; `short.yaml` is refused by its own job, which first reads the text."""
    text = bench.recipe.read_text()
    method = next(line for line in text.splitlines() if line.startswith("quantize:"))
    good = text.replace(method, SMALL)
    (bench.folder / "good.yaml").write_text(good)
    (bench.folder / "short.yaml").write_text(good.replace("evaluation.txt", "few.txt"))
    (bench.folder / "few.txt").write_text("A few words.")


@pytest.fixture(scope="module")
def swept(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench after a sweep over two recipes, side by side; it keeps what the command printed."""
    bench = make_bench(tmp_path_factory.mktemp("swept"), sharded)
    write_recipes(bench)
    done = run_here("sweep", "short.yaml", "good.yaml", "--processes", "2", folder=bench.folder)
    assert done.returncode == 2, done.stderr
    (bench.folder / "stdout.txt").write_text(done.stdout)
    (bench.folder / "stderr.txt").write_text(done.stderr)
    return bench


def test_a_sweep_leaves_outputs_logs_and_tables(swept: Bench) -> None:
    """The one that passes comes first, and the exit code is that of the one that did not."""
    root = swept.folder / "sweep"
    document = json.loads((root / "sweep.json").read_text())
    good, short = document["jobs"]
    assert (good["name"], good["verdict"]) == ("model-good", "PASS")
    assert (short["name"], short["verdict"], short["exit_code"]) == ("model-short", None, 2)
    assert "few.txt" in short["error"]
    assert document["exit_code"] == 2
    assert "take model-good" in document["choices"]["model"]
    assert (swept.folder / good["report"]).is_file()
    assert good["peak_memory_bytes"] > 1_000_000
    assert good["artifacts"][0]["kl"] > 0
    for job, last in ((good, "gate 8/8"), (short, "error: ")):
        log = (swept.folder / job["log"]).read_text()
        assert log.startswith("$ quantkit quantize --recipe ")
        assert log.splitlines()[-1].startswith(last)
    assert (swept.folder / document["reports"]["model"]).is_file()
    assert "[report](model-good/report/report.html)" in (root / "sweep.md").read_text()
    assert {path.name for path in root.iterdir()} == {
        *("model-good", "model-good.log", "model-short.log", "reports", "sweep.json", "sweep.md")
    }


def test_the_terminal_shows_starts_ends_and_a_table(swept: Bench) -> None:
    """A line for each start and each end; the table's rows in the order of the choice."""
    lines = (swept.folder / "stderr.txt").read_text().splitlines()
    assert lines[:2] == ["sweep 0/2  model-short: started", "sweep 0/2  model-good: started"]
    assert [line.split()[1] for line in lines[2:]] == ["1/2", "2/2"]
    assert any("model-good: PASS, " in line for line in lines[2:])
    assert any("model-short: failed with exit code 2, see " in line for line in lines[2:])
    shown = (swept.folder / "stdout.txt").read_text().splitlines()
    names = [line.split()[0] for line in shown if line.startswith("model-")]
    assert names == ["model-good", "model-short"]
    assert any(line.startswith("compare  sweep/reports/model/report.html") for line in shown)


def test_a_second_run_keeps_what_is_finished(swept: Bench) -> None:
    """And says so; whatever differs is refused, and nothing is done anew."""
    log = swept.folder / "sweep" / "model-good.log"
    before = log.read_text()
    again = run_here("sweep", "good.yaml", "--json", folder=swept.folder)
    assert again.returncode == 0, again.stderr
    (said,) = again.stderr.splitlines()
    assert said.startswith("sweep 1/1  model-good: PASS, ")
    assert said.endswith("finished before and kept")
    (job,) = json.loads(again.stdout)["jobs"]
    assert (job["state"], job["verdict"]) == ("kept", "PASS")
    changed = ("sweep", "good.yaml", "--set", "quantize.group_size=64")
    refused = run_here(*changed, folder=swept.folder)
    assert refused.returncode == 2
    assert "exists and differs in quantize.group_size: pass --overwrite" in refused.stderr
    assert log.read_text() == before


def test_all_that_the_headers_refuse_is_told_before_any_work(bench: Bench) -> None:
    """Of all recipes together, and nothing is left behind."""
    wide = bench.recipe.read_text().replace("group_size: 32", "group_size: 128")
    (bench.folder / "wide.yaml").write_text(wide)
    done = run_here("sweep", "recipe.yaml", "wide.yaml", "--quiet", folder=bench.folder)
    assert done.returncode == 2
    assert "model-wide: " in done.stderr
    assert "128" in done.stderr
    assert "model-recipe: " not in done.stderr
    assert not (bench.folder / "sweep").exists()


def test_what_files_alone_refuse_is_told_without_torch(bench: Bench) -> None:
    """In the blink of an eye."""
    done = run("sweep", "nix", "recipe.yaml", "recipe.yaml", folder=bench.folder)
    assert done.returncode == 2
    assert "2 problems found before any work" in done.stderr


def test_ctrl_c_leaves_no_job_and_tells_how_to_go_on(bench: Bench) -> None:
    """SIGINT reaches the sweep alone, as its jobs have groups of their own."""
    arguments = ["sweep", "recipe.yaml", "--output-root", "here"]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=bench.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        started = process.stderr.readline()
        assert started == "sweep 0/1  model-recipe: started\n"
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert shown.splitlines()[-1].endswith(f"goes on: quantkit {' '.join(arguments)}")
    assert "Traceback" not in shown
    left = [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"here/model-recipe" in _read(path) and path.parent.name != str(os.getpid())
    ]
    assert not left


def _read(path: Path) -> bytes:
    """What is in a file of a process that may have ended in the meantime."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.ray
def test_a_sweep_on_ray_does_the_same(sharded: Path, tmp_path: Path) -> None:
    """On a cluster of this machine: the same verdicts, tables and exit code."""
    pytest.importorskip("ray", reason="ray is not installed")
    bench = make_bench(tmp_path, sharded)
    write_recipes(bench)
    options = ("--ray", "local", "--cpus", "1", "--json")
    done = run("sweep", "short.yaml", "good.yaml", *options, folder=bench.folder, **WITH_RAY)
    assert done.returncode == 2, done.stderr
    good, short = json.loads(done.stdout)["jobs"]
    assert (good["name"], good["verdict"]) == ("model-good", "PASS")
    assert (short["name"], short["exit_code"]) == ("model-short", 2)
    assert "quantize 2/2" in (bench.folder / good["log"]).read_text()
    assert not list((bench.folder / "sweep").glob(".node-*"))


@pytest.mark.ray
def test_a_job_that_ray_cannot_place_is_refused(bench: Bench) -> None:
    """Rather than waiting for ever."""
    pytest.importorskip("ray", reason="ray is not installed")
    options = ("--ray", "local", "--cpus", "4096")
    done = run("sweep", "recipe.yaml", *options, folder=bench.folder, **WITH_RAY)
    assert done.returncode == 2
    assert "no node of the cluster has 4096 cores" in done.stderr
