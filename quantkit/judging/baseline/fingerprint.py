"""What the baseline's answers depend on besides the request: its files, its worker, the machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.judging.baseline.store import AnswerStore
from quantkit.judging.worker import child_environment

FORMAT = 1
"""Counted up when what is kept, or what its keys are made of, changes its meaning."""

_NOT_READ = frozenset({".md"})
"""Endings of files that no runtime reads."""
_SMALL = 1 << 20
"""Bytes up to which a file is hashed each time."""
_SETTLED_SECONDS = 2.0
"""A file that was changed so recently may be changed again without its times showing it."""

_SETTING = re.compile(
    r"(ATEN|BLIS|CUBLAS|CUDA|CUDNN|DNNL|GGML|GOMP|HIP|HSA|KMP|LD|LLAMA|MKL|NVIDIA|OMP|ONEDNN|"
    r"OPENBLAS|ORT|PYTHONPATH|PYTORCH|ROCR|TORCH[A-Z]*|TRANSFORMERS|TRITON|VLLM)(_.*)?"
)
"""Names of the variables that decide how, where and with which library is computed."""

FileStates = tuple[tuple[str, int, int, int, int, int], ...]
"""(name, bytes, modified ns, changed ns, inode, device) of each file."""


def digest(value: Any) -> str:
    """Return the sha256 of a JSON-ready value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def look_at_files(folder: Path) -> FileStates:
    """Return the state of every file in and below `folder` that a runtime could read.

    Hidden files are not read, nor is prose. Links to files are followed: the Hub's own folders are
    full of them.

    Raises:
        OSError: a file or folder cannot be read, or `folder` is not one.
    """
    states = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith(".") or path.suffix in _NOT_READ or not path.is_file():
                continue
            found = path.stat()
            times = (found.st_mtime_ns, found.st_ctime_ns)
            where = (found.st_ino, found.st_dev)
            states.append((str(path.relative_to(folder)), found.st_size, *times, *where))
    return tuple(states)


def hash_files(folder: Path, states: FileStates, store: AnswerStore) -> str:
    """Return one sha256 over the names and contents of the files of `look_at_files`.

    Hashing gigabytes takes as long as a small gate, so the store remembers the hash of a large file
    until its size, its times, or its place on the disk change.

    Raises:
        OSError: a file cannot be read.
    """
    return digest([(state[0], _hash_file(folder, state, store)) for state in states])


def describe_worker(command: Sequence[str], threads: int, versions: Mapping[str, str]) -> Any:
    """Return, JSON-ready, with what and how the worker of `command` computes.

    Args:
        command: interpreter and script; every script beside it counts.
        threads: threads of its arithmetic.
        versions: what it says itself.

    Raises:
        OSError: a script cannot be read.
    """
    script = Path(command[-1])
    environment = child_environment(os.environ, threads)
    return {
        "interpreter": command[0],
        "arguments": list(command[1:-1]),
        "scripts": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted({script, *script.parent.glob("*.py")})
        },
        "versions": dict(versions),
        "threads": threads,
        "environment": {
            name: value for name, value in environment.items() if _SETTING.fullmatch(name)
        },
        "machine": _describe_machine(),
    }


def _raise(error: OSError) -> None:
    raise error


def _hash_file(folder: Path, state: tuple[Any, ...], store: AnswerStore) -> str:
    path = folder / state[0]
    if state[1] <= _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    key = digest({"format": FORMAT, "file": [str(path.resolve()), *state[1:]]})
    kept = store.recall(key)
    if kept is not None and isinstance(kept.answer.get("sha256"), str):
        return str(kept.answer["sha256"])
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if time.time() - max(state[2], state[3]) / 1e9 > _SETTLED_SECONDS:
        draft = store.start(key, {"ok": True, "sha256": found})
        if draft is not None:
            store.finish(draft)
    return found


def _describe_machine() -> dict[str, Any]:
    """What decides which kernels run: the processor and the graphics cards, as Linux names them."""
    lines: dict[str, str] = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "flags", "Features", "CPU part"):
                lines[name.strip()] = value.strip()
    cards = Path("/proc/driver/nvidia")
    found = []
    with suppress(OSError, UnicodeDecodeError):
        for path in (cards / "version", *sorted(cards.glob("gpus/*/information"))):
            found += [
                line for line in path.read_text().splitlines() if line.startswith(("NVRM", "Model"))
            ]
    return {
        "architecture": platform.machine(),
        "processor": lines,
        "cards": found,
    }
