"""pyproject.toml asks for what is imported, and for nothing else, and the locks are up to date."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from types import MappingProxyType

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPT_FOLDERS = (
    "benchmarks",
    "quantkit/judging/runtimes",
    "quantkit/serving/servers",
    "scripts/supply",
)
"""Their files are run as scripts, and see each other as modules."""

SET_UP_BESIDE: Mapping[str, str] = MappingProxyType(
    {
        "triton": "triton",
        "ray": "ray",
        "mlflow": "mlflow-skinny",
        "opentelemetry": "opentelemetry-sdk",
        "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http",
        "requests": "requests",
    }
)
"""Module -> the package of an extra that brings it, where .venv does not have that extra."""

OTHERS_OWN: Mapping[str, str] = MappingProxyType(
    {
        "pip": "wheel_metadata.py is run by an environment's own pip",
        "vllm": "in an environment of its own: it wants other versions than quantkit",
        "modelopt": "constraints.txt has it, set up beside .venv for the tests that read its files",
        "auto_round": "a rival's own environment",
        "llmcompressor": "a rival's own environment",
        "llama_cpp": "a rival's own environment",
        "conversion": "a checkout of llama.cpp, whose converter the golden files are from",
    }
)
"""Modules that no extra brings, and why."""

NOT_IMPORTED: Mapping[str, str] = MappingProxyType(
    {
        "compressed-tensors": "transformers loads the artifacts by it",
        "onnxscript": "torch.onnx exports encoders by it",
        "alembic": "MLflow keeps runs in SQLite by it",
        "sqlalchemy": "MLflow keeps runs in SQLite by it",
        "sqlparse": "MLflow searches runs by it",
        "hatchling": "builds the archives",
        "mypy": "make check",
        "pytest-xdist": "pytest -n",
        "ruff": "make check",
        "types-pyyaml": "mypy reads it",
    }
)
"""Packages that are asked for and not imported, and what they are for."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: list[str]) -> set[str]:
    """The packages of some requirements, without quantkit's own extras."""
    names = {canonical(re.split(r"[\[<>=!~;\s]", line)[0]) for line in requirements}
    return names - {"quantkit"}


NEEDED = names_of(PROJECT["dependencies"])
EXTRAS = {
    extra: names_of(lines)
    for extra, lines in PROJECT["optional-dependencies"].items()
    if extra != "dev"
}
DEV = names_of(PROJECT["optional-dependencies"]["dev"])


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports by its full name, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module


def foreign_imports(*folders: str) -> dict[str, Path]:
    """Module -> a file of the folders that imports it; less Python's and the project's own."""
    own = {"quantkit", "tests", "benchmarks", *sys.stdlib_module_names}
    for folder in SCRIPT_FOLDERS:
        own |= {path.stem for path in (ROOT / folder).iterdir()}
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for module in imports_of(path):
                if module.partition(".")[0] not in own:
                    found[module] = path
    return found


@dataclass(frozen=True)
class Imports:
    """What is imported, with a file that does, and which installed packages bring it."""

    package: Mapping[str, Path]
    around: Mapping[str, Path]
    """Of tests, scripts and benchmarks."""
    installed: Mapping[str, list[str]]

    def packages_of(self, module: str) -> set[str]:
        """The packages that may have brought a module: several share `google`, for instance."""
        beside = [name for name in SET_UP_BESIDE if f"{module}.".startswith(f"{name}.")]
        if beside:
            return {SET_UP_BESIDE[max(beside, key=len)]}
        return {canonical(name) for name in self.installed.get(module.partition(".")[0], [])}

    def find_undeclared(self, modules: Mapping[str, Path], declared: set[str]) -> list[str]:
        """The imports that no package of `declared` brings."""
        return [
            f"{path.relative_to(ROOT)}: {module}"
            for module, path in modules.items()
            if not self.packages_of(module) & declared
            and module.partition(".")[0] not in OTHERS_OWN
        ]

    def find_used(self, modules: Mapping[str, Path]) -> set[str]:
        """The packages that bring some modules."""
        return {package for module in modules for package in self.packages_of(module)}


@pytest.fixture(scope="module")
def imports() -> Imports:
    """Read once for all tests."""
    around = foreign_imports("tests", "scripts", "benchmarks")
    return Imports(foreign_imports("quantkit"), around, packages_distributions())


def test_every_import_of_the_package_is_asked_for(imports: Imports) -> None:
    """By the dependencies or by an extra: what others happen to bring may go with their release."""
    assert imports.find_undeclared(imports.package, NEEDED.union(*EXTRAS.values())) == []


def test_every_import_of_tests_and_scripts_is_asked_for(imports: Imports) -> None:
    """By the extra `dev` too."""
    assert imports.find_undeclared(imports.around, NEEDED.union(DEV, *EXTRAS.values())) == []


def test_nothing_is_asked_for_that_is_not_used(imports: Imports) -> None:
    """What is not imported has its reason; what is imported needs none."""
    used = imports.find_used(imports.package)
    everywhere = used | imports.find_used(imports.around)
    shipped = NEEDED.union(*EXTRAS.values())
    reasons = set(NOT_IMPORTED)

    assert sorted(shipped - used - reasons) == []
    assert sorted(DEV - everywhere - reasons) == []
    assert sorted(reasons & used) == [], "no longer needs a reason"
    assert sorted(reasons - shipped - DEV) == [], "is no longer asked for"


def test_the_locks_have_the_tested_versions() -> None:
    """scripts/supply/lock.py has been run since constraints*.txt were changed."""
    command = [sys.executable, "scripts/supply/lock.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_locks_name_no_place() -> None:
    """Where files come from is for pip's settings to say: the hashes are the same everywhere."""
    for path in (ROOT / "locks").iterdir():
        assert "://" not in path.read_text(encoding="utf-8"), path.name


def test_what_is_listed_for_pip_is_what_is_asked_for() -> None:
    """scripts/list_requirements.py follows quantkit's own extras."""
    command = [sys.executable, "scripts/list_requirements.py", "dev"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()

    assert set(PROJECT["dependencies"]) < set(lines)
    assert (
        names_of(lines)
        == NEEDED
        | DEV
        | EXTRAS["datasets"]
        | EXTRAS["fast"]
        | EXTRAS["llama-cpp"]
        | EXTRAS["onnx"]
        | EXTRAS["tasks"]
    )
    command[-1] = "nothing"
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 2
