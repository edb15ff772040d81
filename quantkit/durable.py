"""Files and folders that appear whole or not at all, and stay when the power goes."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from quantkit.errors import writing
from quantkit.masking import hide_tokens

_HERE = -100
"""AT_FDCWD of fcntl.h: paths are relative to the working folder."""
_EXCHANGE = 2
"""RENAME_EXCHANGE of linux/fs.h."""
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, sync it and rename it to `path`.

    Raises:
        ResourceError, OutputError: the file cannot be written; nothing is left of it.
    """
    beside = path.with_name(f"{path.name}.writing")
    try:
        with writing(path):
            write(beside)
            sync(beside)
            beside.replace(path)
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, as `write_atomically` does."""

    def write(beside: Path) -> None:
        beside.write_bytes(text.encode())

    write_atomically(path, write)


def write_words(path: Path, text: str) -> None:
    """Write what is said about a job, as `write_text` does, and no secret along with it."""
    write_text(path, hide_tokens(text))


def sync(path: Path) -> None:
    """Ask the system to put a file's bytes, or a folder's names, on the disk.

    Some file systems, of a network mostly, know no such request for a folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Put every file below a folder on the disk, then the names of every folder, itself included.

    Raises:
        OSError: something cannot be opened or synced.
    """
    for place, _, names in os.walk(folder, topdown=False, onerror=_raise):
        for name in names:
            file = Path(place, name)
            # What a link points to is not ours; the link itself is one of the folder's names.
            if not file.is_symlink():
                sync(file)
        sync(Path(place))


def _raise(error: OSError) -> None:
    raise error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; all that were missing are on the disk on return.

    Raises:
        OSError: it cannot be made, or something else has its name.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def exchange(first: Path, second: Path) -> bool:
    """Let two paths change names in one step; False where the system cannot do that.

    Raises:
        OSError: they cannot be renamed for another reason.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if library.renameat2(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(second))
