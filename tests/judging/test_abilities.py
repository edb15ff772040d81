"""What is found of the runtimes, asked of their own workers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from quantkit.environments.places import RUNTIMES, STAMP
from quantkit.judging import abilities
from quantkit.judging.abilities import examine_runtime, examine_runtimes
from quantkit.judging.evaluate import WORKERS
from tests.environments.fakes import make_environment, make_interpreter


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed in it."""
    monkeypatch.setenv("QUANTKIT_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


def test_each_runtime_is_found_with_its_versions_and_abilities() -> None:
    """vLLM is never here: it wants other versions."""
    found = {each.runtime: each for each in examine_runtimes({})}

    assert list(found) == list(RUNTIMES) == list(WORKERS)
    for name, package in (
        ("transformers", "transformers"),
        ("llama.cpp", "xllamacpp"),
        ("onnxruntime", "onnxruntime"),
    ):
        assert found[name].works
        assert found[name].where == "this interpreter"
        assert found[name].python == sys.executable
        can = found[name].abilities
        assert can is not None
        assert found[name].versions[package] in can.version
        assert "CPU" in can.computes_on
    missing = found["vllm"]
    assert (missing.where, missing.works, missing.abilities) == ("nowhere", False, None)
    assert missing.advice == ("quantkit runtimes install vllm",)


def test_an_environment_that_is_broken_is_told_with_its_last_words(tmp_path: Path) -> None:
    """It stands in the list, with the line that makes it again; the rest is found."""
    python = make_interpreter(tmp_path / "python", "echo cannot load libpython >&2; exit 127")
    make_environment("vllm", python=str(python))
    found = examine_runtime("vllm", {})

    assert found.where == "its environment"
    assert not found.works
    assert found.problem is not None
    assert "ended with exit code 127" in found.problem
    assert found.problem.endswith("its last words: cannot load libpython")
    assert found.advice == ("quantkit runtimes install vllm --overwrite",)


def test_an_interpreter_without_the_packages_is_no_runtime(tmp_path: Path) -> None:
    """The worker answers, and lacks what it needs."""
    bare = make_interpreter(tmp_path / "python", f'exec {shlex.quote(sys.executable)} -S "$@"')
    found = examine_runtime("transformers", {"transformers": str(bare)})
    assert found.where == "gate.python"
    assert found.problem == "the interpreter has no torch"
    nowhere = examine_runtime("vllm", {"vllm": "/nowhere/python"})
    assert nowhere.problem is not None
    assert "there is no such program" in nowhere.problem


def test_an_unfinished_environment_an_unused_and_an_old_one_are_noted(tmp_path: Path) -> None:
    """None of them silently."""
    make_environment("vllm", stamped=False)
    (note,) = examine_runtime("vllm", {}).notes
    assert "an install that did not end has left" in note

    folder = make_environment("transformers")
    (note,) = examine_runtime("transformers", {}).notes
    assert f"--set gate.python.transformers={folder}/bin/python uses it" in note


def test_an_environment_of_older_versions_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works, and the tests were run with others."""
    monkeypatch.setattr(abilities, "is_here", lambda runtime: False)
    monkeypatch.setattr(abilities, "find_python", lambda runtime, named: sys.executable)
    folder = make_environment("llama.cpp")
    assert examine_runtime("llama.cpp", {}).notes == ()
    (folder / STAMP).write_text('{"runtime": "llama.cpp", "build": "cpu", "pins": "old"}')
    found = examine_runtime("llama.cpp", {})
    assert found.works
    assert "other versions than this quantkit is tested with" in found.notes[0]
    assert found.advice == ("quantkit runtimes install llama.cpp --overwrite",)


def test_a_processor_decides_what_vllm_does_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 4-bit kernel is built for AVX-512, its FP8 blocks for AMX."""
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(abilities, "_CPUINFO", cpuinfo)
    assert abilities.read_cpu_flags() is None
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f amx_tile\n")
    flags = abilities.read_cpu_flags()
    assert abilities.say_kernels(flags) == "AVX-512 yes, AVX2 yes, AMX yes"
    said = abilities.say_kernels(frozenset({"avx2"}))
    assert said.startswith("AVX-512 no, AVX2 yes, AMX no; 4-bit weights do not run without AVX-512")
