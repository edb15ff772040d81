"""What an installed quantkit brings with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import quantkit

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_carries_the_version_of_the_package(wheel: Path) -> None:
    """The version has one source."""
    assert wheel.name == f"quantkit-{quantkit.__version__}-py3-none-any.whl"


def test_wheel_holds_every_data_file(wheel: Path) -> None:
    """Family data, templates, recipes, texts, the demo model, tested versions and their hashes."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        f"quantkit/shipped/{path.relative_to(ROOT).as_posix()}"
        for folder in ("recipes", "calib_data", "models")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    names = ("constraints.txt", "constraints-vllm.txt", "constraints-cuda.txt")
    shipped |= {f"quantkit/shipped/{name}" for name in names[:2]}
    shipped |= {f"quantkit/shipped/locks/{name}" for name in names}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "quantkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    assert sorted((shipped | package) - inside) == []


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    """No tests, no benchmarks, no caches."""
    inside = zipfile.ZipFile(wheel).namelist()
    roots = {name.partition("/")[0] for name in inside}

    assert roots == {"quantkit", f"quantkit-{quantkit.__version__}.dist-info"}
    assert not [name for name in inside if name.endswith(".pyc")]


def test_installed_demo_recipe_finds_its_model_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """`plan --recipe demo` works in an empty folder with nothing but the wheel."""
    site, elsewhere = tmp_path / "site", tmp_path / "else where"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)

    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "plan", "--recipe", "demo"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert list(elsewhere.iterdir()) == []


def test_console_script_names_a_function_that_is_there() -> None:
    """`quantkit` and `python -m quantkit` start the same way."""
    module, _, name = PROJECT["project"]["scripts"]["quantkit"].partition(":")

    assert callable(getattr(import_module(module), name))
    assert f"from {module} import {name}" in (ROOT / "quantkit" / "__main__.py").read_text()


def test_constraints_pin_every_dependency() -> None:
    """Whatever pyproject.toml asks for has a version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {
        re.split("[>=]=", requirement)[0].lower().replace("_", "-")
        for group in (PROJECT["project"]["dependencies"], *extras)
        for requirement in group
        if not requirement.startswith("quantkit[")
    }

    assert sorted(wanted - pinned) == []


def test_constraints_name_no_local_build() -> None:
    """A pin such as 2.13.0+cpu would refuse the CUDA build on a machine with a GPU."""
    assert "+" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")
