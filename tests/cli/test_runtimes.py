"""`quantkit runtimes`: one is really installed, found by the gate, and removed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from quantkit.environments.places import find_python
from quantkit.errors import InputError
from quantkit.gating import check_interpreter
from quantkit.recipe import GateSpec
from tests.cli.running import run_here
from tests.environments.fakes import make_environment


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed in it."""
    monkeypatch.setenv("QUANTKIT_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


@pytest.mark.slow
@pytest.mark.skipif(
    "network" in os.environ.get("QUANTKIT_ODD", "").split(),
    reason="NOT TESTED: the package index is cut off",
)
def test_an_installed_runtime_works_and_the_gate_finds_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the package index, over what an install that was killed had left."""
    left = make_environment("llama.cpp", stamped=False)
    (left / "half a package").touch()
    spec = GateSpec(data="x")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"run quantkit runtimes install llama\.cpp, or pip "):
            check_interpreter(spec, "gguf")

    done = run_here("runtimes", "install", "llama.cpp", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["folder"] == str(folder / "llama.cpp")
    assert document["found"]
    assert document["versions"] == {"xllamacpp": "2026.10.11549"}
    assert "install 5/5" in done.stderr
    assert not (left / "half a package").exists()

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        check_interpreter(spec, "gguf")
        assert find_python("llama.cpp", {}) == str(folder / "llama.cpp" / "bin" / "python")
    assert run_here("runtimes", "remove", "llama.cpp").returncode == 0
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_the_list_says_where_each_is_and_what_to_run_for_the_rest() -> None:
    """An interpreter that is named counts; without a terminal every row is one line."""
    done = run_here("runtimes", "list", "--set", f"gate.python.llama.cpp={sys.executable}")
    assert done.returncode == 0, done.stderr
    assert f"llama.cpp     gate.python       {sys.executable}" in done.stdout
    assert "vllm          not found" in done.stdout
    assert "to get it         quantkit runtimes install vllm" in done.stdout


def test_the_list_for_programs_has_every_runtime(tmp_path: Path) -> None:
    """A broken one is part of it, and no failure of the command."""
    done = run_here("runtimes", "list", "--json", "--set", "gate.python.vllm=/bin/false")
    assert done.returncode == 0
    rows = {row["runtime"]: row for row in json.loads(done.stdout)["runtimes"]}
    assert list(rows) == ["transformers", "vllm", "llama.cpp", "onnxruntime"]
    assert rows["vllm"]["problem"].endswith("exit code 1 during 'versions'; it said nothing")
    assert rows["transformers"]["abilities"]["version"].startswith(
        rows["transformers"]["versions"]["transformers"]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["install", "llama"], "runtime 'llama' is unknown; did you mean 'llama.cpp'?"),
        (["remove", "vllm"], "vllm has no environment in"),
        (["list", "--set", "gate.samples=3"], "only gate.python.NAME=PATH matters here"),
        (["list", "--set", "gate.python.vlm=/x"], "runtime 'vlm' is unknown"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], words: str) -> None:
    """Exit code 2."""
    done = run_here("runtimes", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
