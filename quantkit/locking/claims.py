"""A file in place of a lock, where the file system has no locks or keeps them from other machines.

    <folder>/holder           there while a job works, and says who that is
    <folder>/holder.ended     there while one that has ended is taken away

Made with O_EXCL, which NFS has since its third version (open(2)). Nobody takes it away for a job
that was killed: the next one does, where it can see that the job has ended, which it cannot on
another machine. Two that see it at once would take away each other's, hence the second file;
Mercurial does both likewise (its lock.py), and git asks its user in all cases.
"""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.errors import OutputError, writing
from quantkit.locking.holders import (
    Holder,
    describe,
    is_gone,
    make_lines,
    open_regular,
    read_holder,
)

CLAIM = "holder"
_GUARD = "holder.ended"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


def claim(folder: Path, own: Holder) -> None:
    """Make the file that says that `own` works in a folder.

    Raises:
        FileNotFoundError: the folder is gone.
        OutputError: another one works there, or may do so, or the file cannot be written.
        ResourceError: the disk is full.
    """
    path = folder / CLAIM
    while True:
        try:
            _write_new(path, make_lines(own))
            return
        except FileExistsError:
            pass
        if not check_claim(folder):
            _take_away(folder)


def check_claim(folder: Path) -> bool:
    """Whether the file's place is free; False where its holder has ended.

    Raises:
        OutputError: another one works there, or may do so.
    """
    path = folder / CLAIM
    found, there = _read(path)
    if not there:
        return True
    if found is not None and is_gone(found):
        return False
    raise OutputError(
        f"another job works on {folder} ({describe(found)}): wait for it or stop it; if it has "
        f"ended, remove {path}"
    )


def release(folder: Path, own: Holder) -> None:
    """Remove the file, unless it is another's by now.

    Raises:
        OSError: it cannot be removed.
    """
    if _read(folder / CLAIM)[0] == own:
        (folder / CLAIM).unlink(missing_ok=True)


def _take_away(folder: Path) -> None:
    """Remove the file of a holder that has ended."""
    guard = folder / _GUARD
    try:
        _write_new(guard, b"")
    except FileExistsError:
        raise OutputError(
            f"another job begins in {folder} at this moment: wait for it or stop it; if there is "
            f"none, remove {guard}"
        ) from None
    try:
        # Whoever had the guard before may have taken the place.
        if not check_claim(folder):
            (folder / CLAIM).unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that must not be there yet; nothing is left of one that cannot be written.

    Raises:
        FileExistsError, FileNotFoundError: it is there, or its folder is not.
        ResourceError, OutputError: it cannot be written.
    """
    try:
        descriptor = os.open(path, _NEW | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        with writing(path):
            raise error
    try:
        with writing(path):
            os.write(descriptor, content)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[Holder | None, bool]:
    """Return whom the file names, and whether it is there."""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None, False
    except (OSError, ValueError):
        return None, True
    try:
        return read_holder(descriptor), True
    except OSError:
        return None, True
    finally:
        os.close(descriptor)
