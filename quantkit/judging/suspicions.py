"""Signs that fail an artifact whatever its numbers are (docs/gate.md, "Suspicions").

Each check returns sentences; an empty tuple means that nothing was found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CheckpointError, blame_machine

BITS_TOLERANCE = 0.02
"""Relative distance between planned and written bits per weight that metadata can explain."""

WEIGHT_FILES = ("*.safetensors", "*.onnx")
"""What a runtime may load from a folder that was written for it."""

LOOP_PERIOD = 16
"""Longest repeated passage that counts as a loop, in tokens."""
LOOP_SPAN = 24
"""Shortest tail that must repeat, in tokens; at least three turns of the passage."""


def compare_bits_per_weight(written: float, planned: float) -> tuple[str, ...]:
    """Check that the artifact has the bits per weight that its plan promised, within 2 %."""
    if abs(written - planned) <= BITS_TOLERANCE * planned:
        return ()
    return (
        f"the artifact has {written:.4g} bits per weight, but its plan says {planned:.4g}:"
        " layers were quantized that should not be, or left out",
    )


def compare_hashes(folder: Path, recorded: Mapping[str, str]) -> tuple[str, ...]:
    """Check that the files in `folder` are the ones whose sha256 was recorded, and no more weights.

    Args:
        folder: the artifact.
        recorded: path relative to `folder` -> sha256 in hexadecimal.
    """
    found = []
    for name, digest in sorted(recorded.items()):
        try:
            path = join_inside(folder, name)
            with path.open("rb") as handle:
                actual = hashlib.file_digest(handle, "sha256").hexdigest()
        except CheckpointError as error:
            found.append(f"the recorded file {name!r} is refused: {error}")
        except OSError as error:
            blame_machine(error)
            found.append(f"the recorded file {name!r} cannot be read: {error.strerror or error}")
        else:
            if actual != digest:
                found.append(f"the file {name!r} is not the one that was written: sha256 differs")
    strangers = {
        path.relative_to(folder).as_posix()
        for pattern in WEIGHT_FILES
        for path in folder.rglob(pattern)
        if not _is_variant(path, folder)
    }
    found += [
        f"the file {name!r} was not written by the job"
        for name in sorted(strangers - set(recorded))
    ]
    return tuple(found)


def _is_variant(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder of its own evidence, as variants in a repository do."""
    inner = path.relative_to(folder).parts[:-1]
    return bool(inner) and (folder / inner[0] / "quantkit.json").is_file()


def compare_unexpected(baseline: object, candidate: object) -> tuple[str, ...]:
    """Check that the runtime ignored no tensor of the artifact, besides those of the baseline.

    Args:
        baseline, candidate: lists of tensor names, as the workers answered.
    """
    known, found = (
        set(map(str, answer)) if isinstance(answer, list) else set()
        for answer in (baseline, candidate)
    )
    names = sorted(found - known)
    if not names:
        return ()
    return (f"the runtime ignored {len(names)} tensors of the artifact, for instance {names[0]}",)


def has_loop(ids: Sequence[int]) -> bool:
    """Tell whether `ids` ends in a passage of at most 16 tokens that repeats over and over.

    The tail that repeats must be at least 24 tokens and at least three turns of the passage.
    """
    for period in range(1, LOOP_PERIOD + 1):
        span = max(LOOP_SPAN, 3 * period)
        if len(ids) < span:
            return False
        tail = ids[len(ids) - span :]
        if all(tail[i] == tail[i - period] for i in range(period, span)):
            return True
    return False
