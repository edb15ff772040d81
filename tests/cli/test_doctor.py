"""`quantkit doctor`: the machine, the packages, the runtimes, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import run, run_here
from tests.environments.fakes import make_environment, make_interpreter


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed in it."""
    monkeypatch.setenv("QUANTKIT_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


def test_doctor_names_the_machine_and_what_is_missing() -> None:
    """Measured, not guessed."""
    done = run("doctor", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["memory_bytes"] > 1e8
    assert document["packages"]["torch"]
    assert document["runtimes"]["transformers"]["found"]
    onnxruntime = document["runtimes"]["onnxruntime"]
    assert onnxruntime["found"]
    assert onnxruntime["abilities"]["version"] == onnxruntime["versions"]["onnxruntime"]
    assert onnxruntime["abilities"]["generation"].startswith("by onnxruntime-genai 0.18")
    assert list(document["runtimes"]["llama.cpp"]["versions"]) == ["xllamacpp"]
    if document["device"]["device"] == "cpu":
        assert document["device"]["float32_gflops"] > 0
    lines = {item["package"]: item["install"] for item in document["missing"]}
    assert lines.pop("vllm") == "quantkit runtimes install vllm"
    assert all(line.startswith("pip install") for line in lines.values())
    assert not any(item["required"] for item in document["missing"])


def test_a_broken_runtime_is_told_and_ends_in_no_failure(tmp_path: Path) -> None:
    """Only a package that every job needs does."""
    python = make_interpreter(tmp_path / "python", "echo no such library >&2; exit 1")
    make_environment("vllm", python=str(python))
    done = run_here("doctor")
    assert done.returncode == 0
    assert "broken, in its environment" in done.stdout
    assert "its last words: no such library" in done.stdout
    assert "(for the gate in vLLM): quantkit runtimes install vllm --overwrite" in done.stdout
