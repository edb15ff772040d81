"""The one way from a name that a file gave us to a path: nothing outside of the folder."""

from __future__ import annotations

import re
import stat
from pathlib import Path, PurePosixPath

from quantkit.errors import CheckpointError

# Names that Windows gives to devices, with or without an extension:
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED = re.compile(
    r"(con|prn|aux|nul|(com|lpt)[\d¹²³]|conin\$|conout\$|clock\$)\s*(\.|$)", re.IGNORECASE
)

_LONGEST_PART = 255
"""Bytes of one name: NAME_MAX of Linux, and about that of all others."""
_LONGEST_NAME = 4096
"""Bytes of a whole path: PATH_MAX of Linux."""
_SHOWN = 100
"""Characters of a refused name in the message."""


def join_inside(folder: Path, name: str) -> Path:
    """Return `folder / name` if that lies inside of `folder`, links followed.

    There may be nothing yet. What is there is a file or a folder: a pipe would keep its reader
    waiting, and a device may never end.

    A snapshot in the Hub's cache (`snapshots/<commit>`) may link to the `blobs` of its own
    repository, as the Hub's client lays it out.

    Raises:
        CheckpointError: `name` is empty, absolute, too long, climbs with `..`, begins with `~`, has
            a colon, a backslash or what cannot be printed, ends a part with a dot or a blank, is a
            reserved device name, links out of the folder, or is neither a file nor a folder.
    """
    reason = find_fault(name)
    if reason:
        shown = repr(name) if len(name) <= _SHOWN else f"{name[:_SHOWN]!r}..."
        raise CheckpointError(f"{folder} names a file {shown}, which is refused: {reason}")
    path = folder / name
    try:
        target, root = path.resolve(), folder.resolve()
        mode = target.stat().st_mode if target.exists() else stat.S_IFREG
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be resolved: {error}") from None
    if not target.is_relative_to(root) and not _is_own_blob(root, target):
        raise CheckpointError(
            f"{path} links to {target}, outside of the checkpoint: copy the file into the folder"
        )
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise CheckpointError(
            f"{path} is a pipe, a socket or a device: replace it by the file that is meant"
        )
    return path


def find_inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file that a folder may have; None where none is there.

    Raises:
        CheckpointError: as `join_inside`.
    """
    path = join_inside(folder, name)
    return path if path.is_file() else None


def find_fault(name: str) -> str | None:
    """Say why a name that a file or an answer gave us is refused, wherever it would lie."""
    parts = PurePosixPath(name).parts
    if not parts:
        return "it is empty"
    if "\0" in name or "\\" in name:
        return "it holds a NUL or a backslash"
    if not name.isprintable():
        return "it holds characters that cannot be printed"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "it is absolute"
    if ":" in name or name.startswith("~"):
        return "it holds a colon or begins with a tilde, which some programs read as another place"
    if ".." in parts:
        return "it climbs out of the folder"
    if any(part.endswith((".", " ")) for part in parts):
        return "a part of it ends with a dot or a blank, which Windows drops"
    if any(_RESERVED.match(part) for part in parts):
        return "it is a reserved device name"
    if len(name.encode()) > _LONGEST_NAME or any(
        len(part.encode()) > _LONGEST_PART for part in parts
    ):
        return "it is longer than names of files are"
    return None


def _is_own_blob(root: Path, target: Path) -> bool:
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
