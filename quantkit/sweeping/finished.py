"""What an earlier run of a sweep has left: which outputs are what would be made again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CheckpointError
from quantkit.recipe import Recipe
from quantkit.staging import partial_of
from quantkit.sweeping.records import SweepJob

EVIDENCE = "quantkit.json"

_PLACES = ("model", "output")
"""Keys of a recipe that say where something lies: files tell models apart by their hashes."""


def is_there(job: SweepJob) -> bool:
    """Whether a finished output lies where the job would write."""
    return (job.output / EVIDENCE).is_file()


def is_unfinished(job: SweepJob) -> bool:
    """Whether an interrupted job has left blocks to go on from."""
    return any((partial_of(job.output) / "workspace").glob("block-*.safetensors"))


def find_changes(job: SweepJob, model_files: Mapping[str, str], *, gate: bool) -> list[str]:
    """Say in what a finished output differs from what the job would make; nothing: in nothing.

    Compared are the recipe, the hashes of the model's files, whether the gate was run, the age of
    data that are files, and the hashes of what was written.

    Args:
        job: whose output exists.
        model_files: file name -> sha256, of the model as it is now.
        gate: whether the job would be judged.
    """
    path = job.output / EVIDENCE
    try:
        evidence = read_json(path)
        before = evidence["recipe"]["resolved"]
        changes = _differing(before, job.loaded.recipe.model_dump(mode="json"))
        if evidence["model"]["files"] != dict(model_files):
            changes.append("the model's files")
        changes += _damaged(job.output, evidence["artifacts"])
        judged = evidence["verdict"] != "UNJUDGED"
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return [f"{path} cannot be read"]
    if gate and not judged and job.loaded.recipe.gate is not None:
        changes.append("the gate, which was not run")
    return changes + [
        f"{key}, a file that is newer than the output"
        for key, data in _data_files(job.loaded.recipe)
        if os.path.getmtime(data) > path.stat().st_mtime
    ]


def _differing(before: Any, now: Any, path: str = "") -> list[str]:
    """Name the keys in which two recipes differ, as `--set` names them."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted({*before, *now})
            if path or key not in _PLACES
            for found in _differing(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [path]


def _damaged(output: Path, artifacts: Any) -> list[str]:
    """Name the written files that are gone or not what they were."""
    return [
        f"{file}, which is not as it was written"
        for artifact in artifacts
        for name, digest in artifact["files"].items()
        if _hash(file := _place(output, artifact["path"], name)) != digest
    ]


def _place(output: Path, folder: str, name: str) -> Path:
    """Raises CheckpointError where the evidence names what is not in the output."""
    return join_inside(join_inside(output, folder), name)


def _hash(path: Path) -> str | None:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return None


def _data_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the keys of data that are files, and the files."""
    if recipe.calibration is not None:
        yield from _file("calibration.data", recipe.calibration.data)
    if recipe.gate is not None:
        yield from _file("gate.data", recipe.gate.data)


def _file(key: str, data: str) -> Iterator[tuple[str, str]]:
    if os.path.isfile(data):
        yield key, data
