"""One job in a folder: the second is refused at once, and told who the first one is.

    <folder>/lock      locked by flock(2) while a job works; says who does
    <folder>/holder    beside it where the file system cannot lock (`claims`)

The kernel lets go of a lock when its process ends, however it ends: what the file says is for
people, and decides nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantkit.durable import make_folder
from quantkit.errors import OutputError, writing
from quantkit.locking.claims import CLAIM as CLAIM
from quantkit.locking.claims import check_claim, claim, release
from quantkit.locking.holders import (
    Holder,
    describe,
    is_gone,
    make_lines,
    name_holder,
    open_regular,
    read_holder,
)

LOCK = "lock"
LOCK_FILES = frozenset({LOCK, CLAIM})
"""Names in a folder that belong to the lock."""

_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_LOCAL = {"local_lock=flock", "local_lock=all", "localflock"}
"""Mount options of NFS (nfs(5)) and Lustre under which other machines do not see the locks."""
_PAUSE = 0.002
_TRIES = 1000
"""With pauses of seconds in all: no file that somebody plays with keeps a job from its end."""


@dataclass(frozen=True)
class Hold:
    """A lock that is held."""

    folder: Path
    descriptor: int
    note: str | None
    """What the user should know of it; None: it is a lock as it should be."""

    def is_there(self) -> bool:
        """Whether the lock lies in its folder still: a folder that is renamed takes it along."""
        return _is_at(self.descriptor, self.folder / LOCK)


@contextmanager
def locked(folder: Path, *, make: bool = True) -> Iterator[Hold]:
    """Hold the lock of a folder inside.

    Args:
        make: make the folder and the file where they are missing.

    Raises:
        OutputError: another job works there, or the lock cannot be had.
        ResourceError: the disk is full.
        FileNotFoundError: the file is missing, and was not to be made.
    """
    own = name_holder()
    hold = _take(folder, own, make=make)
    try:
        with writing(folder):
            os.ftruncate(hold.descriptor, 0)
            os.pwrite(hold.descriptor, make_lines(own), 0)
        yield hold
    finally:
        # What is left of an interrupted job keeps the file, which says no longer that one works.
        if os.getpid() == own.process:
            with suppress(OSError):
                os.ftruncate(hold.descriptor, 0)
        if hold.note is not None and os.getpid() == own.process:
            with suppress(OSError):
                release(folder, own)
        os.close(hold.descriptor)


def refuse_held(folder: Path) -> None:
    """Refuse a folder in which another job works at this moment; nothing is made or changed.

    Raises:
        OutputError: one does.
    """
    try:
        descriptor = open_regular(folder / LOCK, os.O_RDONLY)
    except (OSError, ValueError):
        # There is none, or the job that takes it says what is wrong with it.
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if is_local(os.fstat(descriptor).st_dev, _read_mounts()):
            check_claim(folder)
    except BlockingIOError:
        raise _refusal(folder, descriptor) from None
    except OSError:
        check_claim(folder)
    finally:
        os.close(descriptor)


def _take(folder: Path, own: Holder, *, make: bool) -> Hold:
    """Open the file and lock it."""
    path = folder / LOCK
    flags = os.O_RDWR | os.O_CREAT if make else os.O_RDWR
    for _ in range(_TRIES):
        try:
            if make:
                make_folder(folder)
            descriptor = open_regular(path, flags)
        except OSError as error:
            # A job that ended took its folder, or one above it, away again before this one used it.
            gone = isinstance(error, FileNotFoundError)
            if make and (gone or (isinstance(error, FileExistsError) and _may_be_made(folder))):
                continue
            if gone:
                raise
            with writing(folder):
                raise error
        except ValueError as error:
            raise OutputError(str(error)) from None
        try:
            note = _lock(folder, descriptor)
            # A job that has ended in the meantime took its folder away, and the file with it.
            if _is_at(descriptor, path) and (note is None or _claimed(folder, own)):
                # The claim may lie in a folder that has changed names with this one since.
                if note is None or _is_at(descriptor, path):
                    return Hold(folder, descriptor, note)
                release(folder, own)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_PAUSE)
    raise OutputError(
        f"cannot lock {folder}: it, or its file {LOCK!r}, is taken away again and again"
    )


def _may_be_made(folder: Path) -> bool:
    """Whether nothing but a folder is there; one may have gone since it was in the way."""
    return folder.is_dir() or not os.path.lexists(folder)


def _lock(folder: Path, descriptor: int) -> str | None:
    """Lock the file, and say what is wrong with that lock.

    Raises:
        OutputError: another job holds it, or it cannot be locked.
    """
    try:
        for _ in range(_TRIES):
            if _try(descriptor):
                break
            # Somebody looks whether it is held, and lets go of it.
            time.sleep(_PAUSE)
        else:
            raise BlockingIOError
    except BlockingIOError:
        raise _refusal(folder, descriptor) from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise OutputError(f"cannot lock {folder}: {error.strerror}") from error
        why = "cannot lock files"
    else:
        if not is_local(os.fstat(descriptor).st_dev, _read_mounts()):
            return None
        why = "keeps locks from other machines"
    return (
        f"the file system of {folder} {why}: the file {CLAIM!r} in there keeps other jobs out; "
        f"after a crash it may have to be removed by hand"
    )


def _try(descriptor: int) -> bool:
    """Lock a file, or return False where it is only looked at.

    Raises:
        BlockingIOError: it is held.
        OSError: it cannot be locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Those who look share it, and he who holds it does not.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return False
    return True


def _claimed(folder: Path, own: Holder) -> bool:
    """Make the file that stands for the lock; False where the folder has gone."""
    try:
        claim(folder, own)
    except FileNotFoundError:
        return False
    return True


def _refusal(folder: Path, descriptor: int) -> OutputError:
    """Say who holds the lock, and what to do."""
    holder = None
    with suppress(OSError):
        holder = read_holder(descriptor)
    who = describe(holder)
    if holder is not None and is_gone(holder):
        return OutputError(
            f"another job works on {folder} ({who}, which has ended while something that it "
            f"started goes on): wait for that or stop it: `fuser {folder / LOCK}` finds it"
        )
    return OutputError(f"another job works on {folder} ({who}): wait for it or stop it")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _read_mounts() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def is_local(device: int, mounts: str) -> bool:
    """Whether locks on a file system hold on this machine alone, though others have it too.

    Args:
        device: `st_dev` of a file on it.
        mounts: text of /proc/self/mountinfo: proc(5).
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        mount, _, rest = line.partition(" - ")
        fields, options = mount.split(" "), rest.split(" ")[2:]
        if len(fields) > 2 and fields[2] == number:
            return any(_LOCAL & set(option.split(",")) for option in options)
    return False
