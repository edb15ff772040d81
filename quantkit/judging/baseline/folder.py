"""Where the baseline's answers are kept, and how many bytes of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISDIR

from quantkit.errors import InputError, OutputError
from quantkit.judging.baseline.entries import list_entries

DEFAULT_BYTES = 8 << 30
FREE_SHARE = 10
"""The store takes this part of the free space at the most: a tenth."""

FOLDER_VARIABLE = "QUANTKIT_CACHE"
BYTES_VARIABLE = "QUANTKIT_CACHE_BYTES"


def find_folder(environment: Mapping[str, str]) -> Path:
    """Return where the store is: QUANTKIT_CACHE, else quantkit's part of the user's cache folder.

    Raises:
        OutputError: the user has no home folder.
    """
    wish = environment.get(FOLDER_VARIABLE, "")
    shared = environment.get("XDG_CACHE_HOME", "")
    try:
        if wish:
            home = Path(wish).expanduser().absolute()
        elif Path(shared).is_absolute():
            home = Path(shared) / "quantkit"
        else:
            home = Path.home() / ".cache" / "quantkit"
    except RuntimeError as error:
        raise OutputError(
            f"there is no place to keep the baseline's answers ({error}): {FOLDER_VARIABLE} names "
            "a folder for them"
        ) from None
    return home / "baselines"


def find_limit(environment: Mapping[str, str]) -> int:
    """Return how many bytes the store may have by QUANTKIT_CACHE_BYTES; 0 switches it off.

    Raises:
        InputError: the variable is not a number of bytes.
    """
    wish = environment.get(BYTES_VARIABLE, "")
    if wish and not (wish.isascii() and wish.isdigit()):
        raise InputError(
            f"{BYTES_VARIABLE} is {wish!r}: a number of bytes is wanted, for instance 8000000000; "
            "0 keeps nothing"
        )
    return int(wish) if wish else DEFAULT_BYTES


def check_folder(folder: Path) -> bool:
    """Whether the store's folder is there; what others could read of ours is closed to them.

    Raises:
        OutputError: it is a link or no folder, belongs to another user, or cannot be looked at.
    """
    try:
        found = folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise OutputError(f"cannot look at {folder}: {error.strerror}") from error
    mend = f"remove it, or name another folder by {FOLDER_VARIABLE}"
    if not S_ISDIR(found.st_mode):
        raise OutputError(f"{folder} is a link or a file, not a folder of our own: {mend}")
    if found.st_uid != os.geteuid():
        raise OutputError(f"{folder} belongs to the user {found.st_uid}: {mend}")
    if found.st_mode & 0o077:
        try:
            folder.chmod(0o700)
        except OSError as error:
            raise OutputError(f"cannot close {folder} to others: {error.strerror}") from error
    return True


def make_folder(folder: Path) -> None:
    """Make the store's folder, for the user alone, and look at what is there; as `check_folder`."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {folder}: {error.strerror}: {FOLDER_VARIABLE} names another folder"
        ) from error
    check_folder(folder)


def find_bound(folder: Path, limit: int) -> int:
    """Return how many bytes the store may have now: `limit`, within a tenth of the free space.

    What it takes already counts as free, so that filling it does not lower its own bound.

    Raises:
        OSError: the folder or its disk cannot be read.
    """
    used = sum(entry.size for entry in list_entries(folder))
    return min(limit, (shutil.disk_usage(folder).free + used) // FREE_SHARE)
