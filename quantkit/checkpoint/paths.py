"""The one way from a name that a file gave us to a path: nothing outside of the folder."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from quantkit.errors import CheckpointError

# Names that Windows gives to devices, with or without an extension.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def join_inside(folder: Path, name: str) -> Path:
    """Return `folder / name` if that lies inside of `folder`, links followed.

    A snapshot in the Hub's cache (`snapshots/<commit>`) may link to the `blobs` of its own
    repository, as the Hub's client lays it out.

    Raises:
        CheckpointError: `name` is empty, absolute, climbs with `..`, has a drive letter, a
            backslash or a NUL, is a reserved device name, or links out of the folder.
    """
    reason = _find_fault(name)
    if reason:
        raise CheckpointError(f"{folder} names a file {name!r}, which is refused: {reason}")
    path = folder / name
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be resolved: {error}") from None
    if not target.is_relative_to(root) and not _is_own_blob(root, target):
        raise CheckpointError(
            f"{path} links to {target}, outside of the checkpoint: copy the file into the folder"
        )
    return path


def _find_fault(name: str) -> str | None:
    if not name or name == ".":
        return "it is empty"
    if "\0" in name or "\\" in name:
        return "it holds a NUL or a backslash"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "it is absolute"
    parts = PurePosixPath(name).parts
    if ".." in parts:
        return "it climbs out of the folder"
    if any(_RESERVED.match(part) for part in parts):
        return "it is a reserved device name"
    return None


def _is_own_blob(root: Path, target: Path) -> bool:
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
