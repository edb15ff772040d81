"""What is said of pip when it fails, and what is left of it when it is stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from quantkit.environments.programs import METADATA_SCRIPT, run_program
from quantkit.errors import InputError, ResourceError


def fail(script: str) -> None:
    """Run a program that fails as pip does."""
    run_program(["sh", "-c", f"{script}; exit 1"], "pip cannot install x", lambda line: None)


def test_the_last_errors_are_told_in_one_line() -> None:
    """Warnings are not the reason, except those about the index."""
    with pytest.raises(InputError) as caught:
        fail("echo WARNING: old; echo 'ERROR: No matching\tdistribution'; echo bye")
    assert str(caught.value) == "pip cannot install x: ERROR: No matching distribution"
    with pytest.raises(InputError, match=r"install x: it said nothing$"):
        fail("true")
    with pytest.raises(InputError, match=r"x: the package index was not reached; .*\(Refused\)$"):
        fail("echo 'WARNING: Retrying after connection broken by Refused' >&2; echo ERROR: none")


def test_a_full_disk_and_a_python_without_ensurepip_have_their_own_words() -> None:
    """Both can be mended by the user, each otherwise."""
    with pytest.raises(ResourceError, match="no space left on the disk"):
        fail("echo 'ERROR: [Errno 28] No space left on device'")
    with pytest.raises(InputError, match=r"has no ensurepip; .*apt-get install python3-venv"):
        fail("echo 'not created successfully because ensurepip is not available'")


def test_a_program_that_is_stopped_leaves_no_process() -> None:
    """Ctrl-C reaches us alone; what pip has started ends with it."""
    seen: list[Path] = []

    def interrupt(line: str) -> None:
        seen.append(Path("/proc", line, "stat"))
        assert runs(seen[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_program(["sh", "-c", "sleep 60 & echo $!; wait"], "x", interrupt)
    deadline = time.monotonic() + 5
    while runs(seen[0]):
        assert time.monotonic() < deadline


def runs(process: Path) -> bool:
    """Whether it is there, and no zombie."""
    try:
        return process.read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_program_does_not_see_our_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip would install elsewhere."""
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("PIP_TARGET", "/ours")
    said: list[str] = []
    run_program(["sh", "-c", "echo [$PYTHONPATH$PIP_TARGET]"], "x", said.append)
    assert said == ["[]"]


def ask(*arguments: str | Path) -> list[str]:
    """Run the script that reads wheels."""
    command = [sys.executable, "-I", str(METADATA_SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")


def test_of_what_a_wheel_asks_for_the_pinned_packages_are_taken(tmp_path: Path) -> None:
    """Not torch, nor what is for another system or an extra, nor what nobody pinned."""
    needs = ["Some_Thing>=1", "torch==2", "free", 'other; extra == "x"', 'gone; python_version<"3"']
    metadata = "".join(f"Requires-Dist: {line}\n" for line in needs)
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as archive:
        archive.writestr("a-1.dist-info/METADATA", f"Name: a\n{metadata}")
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\nsome-thing==1.2\ntorch==2\nother==1\ngone==1\n")

    assert ask("needs", pins, tmp_path) == ["Some_Thing>=1", ""]


@pytest.mark.parametrize(
    ("version", "needs", "build"),
    [
        ("2.13.0", ["numpy", "nvidia-cublas==13"], "cuda"),
        ("2.13.0", ["numpy", 'nvidia-cublas; sys_platform == "win32"'], "cpu"),
        ("2.13.0+cpu", ["cuda-toolkit"], "cpu"),
    ],
)
def test_a_build_of_torch_is_known_by_the_libraries_it_asks_for(
    tmp_path: Path, version: str, needs: list[str], build: str
) -> None:
    """From pip's report, before anything is downloaded."""
    metadata = {"version": version, "requires_dist": needs}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"install": [{"metadata": metadata}]}))
    assert ask("build", report) == [build, ""]
