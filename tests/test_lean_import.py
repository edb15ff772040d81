"""Importing quantkit is quick, quiet and alone: no torch, no network, nothing started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "pyarrow", "datasets")

PROBE = """
import json, sys, threading, time

def refuse(event, arguments):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen"}:
        raise RuntimeError(f"importing {sys.argv[1]} did {event}")

sys.addaudithook(refuse)
start = time.perf_counter()
__import__(sys.argv[1])
seconds = time.perf_counter() - start
heavy = sorted(set(sys.argv[2].split(",")) & set(sys.modules))
print(json.dumps([seconds, heavy, threading.active_count()]))
"""


def import_alone(module: str) -> tuple[float, list[str], int]:
    """Import `module` in a fresh interpreter: seconds, heavy packages it pulled in, threads."""
    command = [sys.executable, "-c", PROBE, module, ",".join(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    seconds, heavy, threads = json.loads(done.stdout)
    return seconds, heavy, threads


def test_importing_quantkit_takes_less_than_three_tenths_of_a_second() -> None:
    """The best of five: the machine may be busy, the import may not be slow."""
    assert min(import_alone("quantkit")[0] for _ in range(5)) < 0.3


@pytest.mark.parametrize(
    "module",
    [
        "quantkit",
        "quantkit.cli.main",
        "quantkit.inputs",
        "quantkit.recipe",
        "quantkit.records",
        "quantkit.schemes",
    ],
)
def test_a_light_module_imports_nothing_heavy_and_starts_nothing(module: str) -> None:
    """Recipes are read, help is printed and errors are told without torch or a socket."""
    _, heavy, threads = import_alone(module)
    assert heavy == []
    assert threads == 1


def test_the_public_names_of_recipes_need_nothing_heavy() -> None:
    """`quantkit.load_recipe` and the errors are used by tools that have no torch."""
    probe = (
        "import sys, quantkit; quantkit.load_recipe; quantkit.Recipe; quantkit.recipe_schema();"
        "quantkit.QuantkitError; quantkit.Plan; quantkit.Event;"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
