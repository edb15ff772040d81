"""pip is given the hashes of what it may install."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quantkit.environments.locks import are_verified, write_constraints, write_pip_requirement
from quantkit.environments.places import RUNTIMES, requirements_of
from quantkit.errors import InputError


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_that_a_runtime_is_asked_for_has_hashes(runtime: str, tmp_path: Path) -> None:
    """And pip itself, as a requirement of its own."""
    text = write_constraints(runtime, "cpu", tmp_path).read_text()
    for requirement in requirements_of(runtime, "cpu"):
        assert f"\n{requirement} \\\n    --hash=sha256:" in text
    entry = write_pip_requirement(tmp_path / "constraints.txt").read_text()
    assert entry.startswith("pip==")
    assert entry.count("==") == 1
    assert entry.count("--hash=sha256:") >= 1


def test_cuda_brings_hashes_of_its_libraries(tmp_path: Path) -> None:
    """Those of vLLM's build nobody has: its versions are taken without, and not in silence."""
    assert "\nnvidia-cublas==" in write_constraints("transformers", "cuda", tmp_path).read_text()
    assert not are_verified("vllm", "cuda")
    assert "--hash" not in write_constraints("vllm", "cuda", tmp_path).read_text()


def test_hashes_can_be_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sources with builds of their own; the versions stay."""
    monkeypatch.setenv("QUANTKIT_HASHES", "off")
    text = write_constraints("llama.cpp", "cpu", tmp_path).read_text()
    assert "--hash" not in text
    assert set(requirements_of("llama.cpp", "cpu")) <= set(text.splitlines())
    monkeypatch.setenv("QUANTKIT_HASHES", "no")
    with pytest.raises(InputError, match="QUANTKIT_HASHES is 'no': use on or off"):
        write_constraints("llama.cpp", "cpu", tmp_path)


@pytest.mark.supply
def test_a_package_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    """pip reads the file that it has found under the right name and version, and says why not."""
    lock = write_constraints("llama.cpp", "cpu", tmp_path)
    name, version = "idna", _version_of("idna", lock)
    with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        folder = f"{name}-{version}.dist-info"
        wheel.writestr("idna/__init__.py", "raise SystemExit('this code ran')\n")
        wheel.writestr(
            f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{folder}/RECORD", "")
    target = tmp_path / "target"
    found = ("--no-index", "--find-links", str(tmp_path), "--target", str(target))
    command = [sys.executable, "-m", "pip", "--isolated", "install", *found, "-c", str(lock), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not target.exists()


def _version_of(name: str, lock: Path) -> str:
    lines = lock.read_text().splitlines()
    (version,) = [line.split("==")[1].split()[0] for line in lines if line.startswith(f"{name}==")]
    return version
