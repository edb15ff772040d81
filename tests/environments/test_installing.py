"""An install is complete or leaves nothing; what was there before stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.environments import installing
from quantkit.environments.installing import install, remove
from quantkit.environments.places import find_environment
from quantkit.errors import InputError, OutputError, ResourceError
from quantkit.locking import locked
from tests.environments.fakes import make_environment, make_interpreter


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed in it."""
    monkeypatch.setenv("QUANTKIT_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


def test_an_install_that_fails_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment that is replaced, or nothing."""
    words = "echo 'was not created successfully because ensurepip is not available'"
    script = f'test "$3" = venv && mkdir "$4" && touch "$4/half" && {words}; exit 1'
    monkeypatch.setattr("sys.executable", str(make_interpreter(tmp_path / "python", script)))
    make_environment("llama.cpp")

    for runtime in ("llama.cpp", "onnxruntime"):
        with pytest.raises(InputError, match=rf"environment for {runtime}: .* has no ensurepip"):
            install(runtime, overwrite=True)

    found = find_environment("llama.cpp")
    assert found is not None
    assert not (found.folder / "half").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["llama.cpp", "lock"]


def test_what_is_there_is_replaced_only_on_request(folder: Path) -> None:
    """And what is no environment, never."""
    made = make_environment("llama.cpp")
    with pytest.raises(OutputError, match="is there already: pass --overwrite"):
        install("llama.cpp")
    (made / "pyvenv.cfg").unlink()
    for change in (lambda: install("llama.cpp", overwrite=True), lambda: remove("llama.cpp")):
        with pytest.raises(OutputError, match="is no environment: move it away"):
            change()
    assert (made / "bin" / "python").exists()


def test_what_a_killed_install_had_set_aside_comes_back(folder: Path) -> None:
    """It is finished, and what the install had made is not."""
    make_environment("llama.cpp").rename(folder / "llama.cpp.before")
    half = make_environment("llama.cpp", stamped=False)
    (half / "half").touch()

    with pytest.raises(OutputError, match="is there already"):
        install("llama.cpp")
    assert find_environment("llama.cpp") is not None
    assert not (half / "half").exists()
    assert not (folder / "llama.cpp.before").exists()


def test_a_disk_that_is_too_small_is_told_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed and what there is."""
    monkeypatch.setattr(installing, "NEEDED_BYTES", {("llama.cpp", "cpu"): 10**18})
    with pytest.raises(ResourceError, match=r"needs about 1000000000\.0 GB .* GB are free: free"):
        install("llama.cpp")
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_two_installs_do_not_meet(folder: Path) -> None:
    """Nor does a removal."""
    made = make_environment("llama.cpp")
    with locked(folder):
        for change in (lambda: install("llama.cpp", overwrite=True), lambda: remove("llama.cpp")):
            with pytest.raises(OutputError, match="another job works on"):
                change()
    assert made.exists()


def test_an_environment_is_removed_finished_or_not() -> None:
    """One that is not there is an error."""
    for stamped in (True, False):
        made = make_environment("vllm", stamped=stamped)
        assert remove("vllm") == made
        assert not made.exists()
    with pytest.raises(InputError, match="vllm has no environment in"):
        remove("vllm")
    with pytest.raises(InputError, match=r"'vlm' is unknown; did you mean 'vllm'\?"):
        remove("vlm")


def test_the_build_is_chosen_by_the_machine_or_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runtimes on torch; the others' wheels compute on CPUs."""
    monkeypatch.setenv("QUANTKIT_TORCH", "cuda")
    assert installing.choose_build("vllm") == "cuda"
    assert installing.choose_build("llama.cpp") == "cpu"
    monkeypatch.setenv("QUANTKIT_TORCH", "gpu")
    with pytest.raises(InputError, match="QUANTKIT_TORCH is 'gpu': use auto, cpu or cuda"):
        installing.choose_build("vllm")
