"""Which limits a gate applies, and what it makes of an artifact's own evidence."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import CheckpointError, InputError, RecipeError
from quantkit.evidence import find_runtime, read_evidence
from quantkit.gating import check_interpreter, check_recorded_files, find_gate_spec
from quantkit.recipe import GateSpec, Recipe


def evidence_with(gate: object) -> dict[str, Any]:
    return {"recipe": {"resolved": {"version": 1, "gate": gate}}}


def test_the_recipe_comes_before_the_evidence_and_both_before_the_defaults() -> None:
    """`--data` replaces the text alone."""
    recipe = Recipe.model_validate({"version": 1, "gate": {"data": "a", "max_kl": 1}})
    recorded = evidence_with({"data": "b", "max_kl": 2})

    assert find_gate_spec(recipe, recorded, None, ()).max_kl == 1
    assert find_gate_spec(None, recorded, None, ()) == GateSpec(data="b", max_kl=2)
    assert find_gate_spec(None, recorded, "c", ()) == GateSpec(data="c", max_kl=2)
    assert find_gate_spec(None, {}, "c", ()) == GateSpec(data="c")
    assert find_gate_spec(Recipe(version=1), recorded, "c", ()) == GateSpec(data="c")


def test_overrides_of_the_gate_apply_and_others_are_refused() -> None:
    """A key that could not change anything is not taken in silence."""
    recorded = evidence_with({"data": "b"})

    assert find_gate_spec(None, recorded, None, ["gate.max_kl=0.5"]).max_kl == 0.5
    assert recorded == evidence_with({"data": "b"})
    for recipe in (None, "awq4"):
        with pytest.raises(RecipeError, match=r"quantize.group_size=64'.*gate\.KEY=VALUE"):
            find_gate_spec(recipe, recorded, None, ["quantize.group_size=64"])


def test_an_artifact_does_not_choose_the_interpreter_that_is_run() -> None:
    """Its evidence is somebody else's bytes; the user's own recipe may name one."""
    recorded = evidence_with({"data": "b", "python": {"transformers": "./artifact/evil"}})
    override = ["gate.python.transformers=/my/python", "gate.python.llama.cpp=/its/python"]

    assert find_gate_spec(None, recorded, None, ()).python == {}
    assert find_gate_spec(None, recorded, None, override).python == {
        "transformers": "/my/python",
        "llama.cpp": "/its/python",
    }


@pytest.mark.parametrize(
    "recorded",
    [{}, {"recipe": None}, {"recipe": "text"}, {"recipe": {"resolved": []}}, evidence_with(None)],
)
def test_evidence_of_another_shape_is_as_good_as_none(recorded: dict[str, Any]) -> None:
    """The user hears what is missing, not that a stranger's file has no such key."""
    with pytest.raises(InputError, match="no evaluation data: pass --data FILE"):
        find_gate_spec(None, recorded, None, ())


@pytest.mark.parametrize("gate", [7, [1], {"data": "b", "max_kl": "high"}, {"dta": "b"}])
def test_a_recorded_gate_that_is_wrong_is_refused_as_a_recipe_would_be(gate: object) -> None:
    """One clear line."""
    with pytest.raises(RecipeError, match="gate"):
        find_gate_spec(None, evidence_with(gate), None, ())


def test_files_that_are_not_those_of_the_evidence_are_suspicious(tmp_path: Path) -> None:
    """The hashes are computed again; evidence without any says nothing."""
    folder = tmp_path / "compressed-tensors"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    row = {"path": "compressed-tensors", "files": {"model.safetensors": digest}}

    assert check_recorded_files({"artifacts": [row]}, folder) == ()
    (folder / "model.safetensors").write_bytes(b"other weights")
    (found,) = check_recorded_files({"artifacts": [row]}, folder)
    assert "'model.safetensors' is not the one that was written" in found
    for silent in ({}, {"artifacts": 3}, {"artifacts": [None, row | {"path": "gguf"}]}):
        assert check_recorded_files(silent, folder) == ()


def test_evidence_is_found_around_the_artifact_and_must_be_whole(tmp_path: Path) -> None:
    """In the folder itself, or in the output that a compressed-tensors folder lies in."""
    inside = tmp_path / "compressed-tensors"
    inside.mkdir()
    assert read_evidence(inside) == {}
    (tmp_path / "quantkit.json").write_text('{"schema": 1}')
    assert read_evidence(inside) == read_evidence(tmp_path) == {"schema": 1}
    (tmp_path / "quantkit.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"quantkit\.json is not valid JSON"):
        read_evidence(inside)


def test_a_runtime_that_is_not_here_is_refused_with_what_to_name() -> None:
    """vLLM lives in an environment of its own; transformers is always here."""
    check_interpreter(GateSpec(data="x"), "compressed-tensors")
    with pytest.raises(InputError, match=r"--set gate\.python\.vllm=/path/to/python"):
        check_interpreter(GateSpec(data="x", runtime="vllm"), "compressed-tensors")
    nowhere = GateSpec(data="x", runtime="vllm", python={"vllm": "/nowhere/python"})
    with pytest.raises(InputError, match="there is no such program"):
        check_interpreter(nowhere, "compressed-tensors")


def test_gguf_files_are_for_llama_cpp_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` finds it; another runtime is refused, as is llama.cpp for other artifacts."""
    assert find_runtime(GateSpec(data="x"), "gguf") == "llama.cpp"
    assert find_runtime(GateSpec(data="x"), "compressed-tensors") == "transformers"
    check_interpreter(GateSpec(data="x"), "gguf")
    with pytest.raises(InputError, match=r"transformers does not load gguf: set .* llama\.cpp for"):
        check_interpreter(GateSpec(data="x", runtime="transformers"), "gguf")
    with pytest.raises(InputError, match=r"llama\.cpp does not load compressed-tensors: set"):
        check_interpreter(GateSpec(data="x", runtime="llama.cpp"), "compressed-tensors")
    nowhere = GateSpec(data="x", python={"transformers": "/nowhere/python"})
    with pytest.raises(InputError, match="there is no such program"):
        check_interpreter(nowhere, "gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "quantkit\[llama-cpp\]"'):
        check_interpreter(GateSpec(data="x"), "gguf")


def test_onnx_files_are_for_onnx_runtime_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` finds it; no other runtime loads them, and it loads nothing else."""
    assert find_runtime(GateSpec(data="x"), "onnx") == "onnxruntime"
    check_interpreter(GateSpec(data="x"), "onnx")
    for runtime, written, words in (
        ("transformers", "onnx", r"transformers does not load onnx: set .* onnxruntime for onnx"),
        ("llama.cpp", "onnx", r"llama\.cpp does not load onnx: set .* onnxruntime for onnx"),
        ("onnxruntime", "gguf", r"onnxruntime does not load gguf: set .* llama\.cpp for gguf"),
        ("onnxruntime", "compressed-tensors", r"onnxruntime does not load .* is transformers for"),
    ):
        with pytest.raises(InputError, match=words):
            check_interpreter(GateSpec(data="x", runtime=runtime), written)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "quantkit\[onnx\]"'):
        check_interpreter(GateSpec(data="x"), "onnx")
    check_interpreter(GateSpec(data="x", python={"onnxruntime": sys.executable}), "onnx")
