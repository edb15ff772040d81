"""Whole jobs through the real command: verdicts, the same bytes twice, stopped and resumed."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Bench, make_bench
from tests.cli.running import COMMAND, environment, run, run_here


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench whose job has run through, undisturbed; it keeps what the command printed."""
    bench = make_bench(tmp_path_factory.mktemp("finished"), pico)
    done = run("quantize", "--recipe", bench.recipe, "--json", folder=bench.folder)
    assert done.returncode == 0, done.stderr
    (bench.folder / "stdout.json").write_text(done.stdout)
    (bench.folder / "stderr.txt").write_text(done.stderr)
    return bench


def test_a_job_leaves_what_the_design_says(finished: Bench) -> None:
    """Evidence, artifact, reports; and nothing beside them."""
    names = set(content(finished.output))
    assert {
        "quantkit.json",
        "compressed-tensors/config.json",
        "compressed-tensors/model.safetensors",
        "compressed-tensors/tokenizer.json",
        "compressed-tensors/README.md",
        "report/report.html",
        "report/report.json",
        "report/report.md",
        "report/junit.xml",
    } <= names
    assert not (finished.folder / "out.partial").exists()
    assert not [
        name for name in names if "workspace" in name or name.endswith((".writing", "lock"))
    ]


def test_json_is_one_document_with_the_verdict_and_what_comes_next(finished: Bench) -> None:
    """Progress went to stderr, one line a block."""
    document = json.loads((finished.folder / "stdout.json").read_text())
    assert document["verdict"] == "PASS"
    assert document["exit_code"] == 0
    assert Path(finished.folder, document["report"]).is_file()
    *command, folder = shlex.split(document["serve"])
    assert command == ["vllm", "serve"]
    assert Path(finished.folder, folder, "config.json").is_file()
    report = json.loads((finished.output / "report" / "report.json").read_text())
    assert document["artifacts"] == report["artifacts"]
    (artifact,) = report["artifacts"]
    assert {"torch", "transformers", "dtype", "device"} <= artifact["measured_with"].keys()
    evidence = json.loads((finished.output / "quantkit.json").read_text())
    assert evidence["measured_with"] == {artifact["name"]: artifact["measured_with"]}
    lines = (finished.folder / "stderr.txt").read_text().splitlines()
    blocks = [line for line in lines if line.startswith("quantize ")]
    assert [line.split()[1] for line in blocks] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(f"model.layers.{block}" in line for block, line in enumerate(blocks))
    assert not [line for line in lines if "Traceback" in line or "Warning" in line]


def test_stopped_twice_and_started_again_a_job_ends_in_the_same_bytes(
    finished: Bench, pico: Path, tmp_path: Path
) -> None:
    """Ctrl-C in the walk and SIGTERM in the gate: exit code 130, the command that goes on."""
    bench = make_bench(tmp_path, pico)
    arguments = ["quantize", "--recipe", str(bench.recipe)]
    for stop, stage in ((signal.SIGINT, "quantize 2/4"), (signal.SIGTERM, "gate ")):
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=bench.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(stage):
                break
        process.send_signal(stop)
        stopped = time.monotonic()
        shown = process.communicate(timeout=60)[1]
        assert time.monotonic() - stopped < 5  # two seconds, and room for a machine that is busy
        assert process.returncode == 130
        last = shown.splitlines()[-1]
        assert last.startswith("error: interrupted")
        assert last.endswith(shlex.join(["quantkit", *arguments]))
        assert "Traceback" not in shown
        assert not bench.output.exists()
    done = run(*arguments, folder=bench.folder)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert not (bench.folder / "out.partial").exists()
    ours, theirs = (content(b.output / "compressed-tensors") for b in (bench, finished))
    assert ours == theirs


@pytest.fixture(scope="module")
def failed(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The same job in another folder, judged by a limit that no quantized model can hold."""
    bench = make_bench(tmp_path_factory.mktemp("failed"), pico)
    arguments = ["--recipe", str(bench.recipe), "--set", "gate.max_kl=0.000001", "--quiet"]
    done = run("quantize", *arguments, folder=bench.folder)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    (bench.folder / "stdout.txt").write_text(done.stdout)
    return bench


def test_two_runs_write_the_same_bytes(finished: Bench, failed: Bench) -> None:
    """Another folder, another process; of all files only the model card tells the verdict."""
    ours, theirs = (content(b.output / "compressed-tensors") for b in (finished, failed))
    assert ours.pop("README.md") != theirs.pop("README.md")
    assert ours == theirs


def test_a_strict_gate_exits_with_three_and_marks_the_artifact_everywhere(failed: Bench) -> None:
    """The artifact is kept for whoever wants to know why, and nobody can mistake it."""
    shown = (failed.folder / "stdout.txt").read_text()
    assert "FAIL" in shown
    assert "KL divergence of " in shown
    assert "vllm serve" not in shown
    assert str(Path("out", "report", "report.html")) in shown
    assert (failed.output / "compressed-tensors" / "model.safetensors").is_file()
    for name in ("quantkit.json", "report/report.json"):
        assert json.loads((failed.output / name).read_text())["verdict"] == "FAIL"
    for name in ("report/report.html", "report/report.md", "compressed-tensors/README.md"):
        assert "FAIL" in (failed.output / name).read_text()
    assert "<failure" in (failed.output / "report" / "junit.xml").read_text()


def test_a_gate_measures_again_what_the_job_measured(finished: Bench, tmp_path: Path) -> None:
    """By the limits in the artifact's own evidence, number for number."""
    arguments = ["gate", finished.output, "--baseline", finished.model]
    done = run(*arguments, "--output", tmp_path / "gate", "--json", folder=finished.folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == "PASS"
    assert Path(finished.folder, document["report"]).is_file()
    ours = document["artifacts"][0]
    theirs = json.loads((finished.output / "report" / "report.json").read_text())["artifacts"][0]
    for key in ("checks", "metrics", "size_bytes", "bits_per_weight", "windows"):
        assert ours[key] == theirs[key], key
    assert any("the artifact's own quantkit.json" in note for note in document["notes"])


def test_too_few_windows_are_inconclusive_and_exit_with_four(
    finished: Bench, tmp_path: Path
) -> None:
    """The gate does not pass what it could not measure."""
    arguments = ["gate", finished.output, "--baseline", finished.model, "--set", "gate.samples=2"]
    done = run_here(*arguments, "--output", tmp_path / "gate", "--quiet", folder=finished.folder)
    assert done.returncode == 4, done.stderr
    assert "INCONCLUSIVE" in done.stdout
    assert done.stderr == ""


def test_a_changed_artifact_fails_whatever_its_numbers_are(finished: Bench, tmp_path: Path) -> None:
    """The files are compared with the hashes in their evidence."""
    copy = shutil.copytree(finished.output, tmp_path / "copy")
    tokenizer = copy / "compressed-tensors" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    arguments = ["gate", copy, "--baseline", finished.model, "--set", "gate.samples=2"]
    done = run_here(*arguments, "--json", folder=finished.folder)
    assert done.returncode == 3, done.stderr
    (artifact,) = json.loads(done.stdout)["artifacts"]
    assert "'tokenizer_config.json' is not the one that was written" in artifact["reasons"][0]
    assert (tmp_path / "copy.gate" / "report.html").is_file()


def test_without_a_gate_unjudged_and_overwritten_as_a_whole(bench: Bench) -> None:
    """Exit code 0 and no claim; a second job that may replace the first leaves nothing of it."""
    for more in (["quantize.group_size=64"], ["quantize.scheme=w8a16", "--overwrite"]):
        arguments = ["--recipe", str(bench.recipe), "--no-gate", "--quiet", "--set", *more]
        arguments += ["--set", "quantize.method=rtn"]
        done = run_here("quantize", *arguments, folder=bench.folder)
        assert done.returncode == 0, done.stderr
        assert "UNJUDGED" in done.stdout
        evidence = json.loads((bench.output / "quantkit.json").read_text())
        assert evidence["verdict"] == "UNJUDGED"
    assert {layer["scheme"] for layer in evidence["layers"]} == {"w8a16"}
    assert sorted(path.name for path in bench.folder.iterdir() if "out" in path.name) == ["out"]
