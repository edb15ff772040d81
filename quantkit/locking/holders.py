"""Who holds a lock, as the lock's file says it to other processes, and whether that one is there.

    process 4711 on node7 since 2026-11-30 02:55:12 UTC
    started 8123456 in 0f3a9c1be2d47788 as 5d1c07aa

The second line is for programs. A number of a process is used again, after a restart or later the
same day: with the start of the process, and with what it is a number in, it is never another's.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MOST_BYTES = 1024
"""Read of a lock's file, whose two lines are shorter: its bytes may be a stranger's."""
_UNNAMED = "its lock does not say which"
_LINES = re.compile(
    r"process (?P<process>\d{1,10}) on (?P<host>[\w.?-]{1,64}) since (?P<since>[\d :-]{19}) UTC\n"
    r"started (?P<started>\d{1,20}) in (?P<machine>[0-9a-f]{16}) as (?P<mark>[0-9a-f]{8})\n",
    re.ASCII,
)


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock."""

    process: int
    host: str
    since: str
    """When it took the lock: date and time in UTC."""
    started: int
    """When the process began, in ticks after the start of its machine; 0: unknown."""
    machine: str
    """Tells in which run of which machine, and of its containers, `process` is counted."""
    mark: str
    """Random: tells two locks of one process apart."""


def name_holder() -> Holder:
    """Return this process as the holder of a lock."""
    return Holder(
        process=os.getpid(),
        host=re.sub(r"[^\w.-]", "?", os.uname().nodename, flags=re.ASCII)[:64] or "?",
        since=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        started=_find_start(os.getpid()) or 0,
        machine=_name_machine(),
        mark=secrets.token_hex(4),
    )


def make_lines(holder: Holder) -> bytes:
    """Return what a lock's file says of its holder."""
    return (
        f"{describe(holder)}\nstarted {holder.started} in {holder.machine} as {holder.mark}\n"
    ).encode()


def describe(holder: Holder | None) -> str:
    """Say in words for people who holds a lock; None: whose file says nothing that can be read."""
    if holder is None:
        return _UNNAMED
    return f"process {holder.process} on {holder.host} since {holder.since} UTC"


def read_holder(descriptor: int) -> Holder | None:
    """Return whom an open regular file names as the holder; None where it names nobody.

    Raises:
        OSError: it cannot be read.
    """
    found = _LINES.fullmatch(os.pread(descriptor, _MOST_BYTES, 0).decode("ascii", "replace"))
    if found is None:
        return None
    return Holder(
        process=int(found["process"]),
        host=found["host"],
        since=found["since"],
        started=int(found["started"]),
        machine=found["machine"],
        mark=found["mark"],
    )


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file without following a link or waiting for the other end of a pipe.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else; the message says what to do.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which quantkit did not make: remove it")
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    found = os.fstat(descriptor)
    # A file with a second name may be one that matters under the other.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        what = "no regular file" if found.st_nlink < 2 else "the second name of another file"
        raise ValueError(f"{path} is {what}, which quantkit did not make: remove it")
    return descriptor


def is_gone(holder: Holder) -> bool:
    """Whether a holder has ended for certain; of another machine or container nobody knows."""
    if holder.machine != _name_machine():
        return False
    start = _find_start(holder.process)
    return start is None or (0 not in (start, holder.started) and start != holder.started)


def _name_machine() -> str:
    """Digest of what a process's number counts in: this run of the kernel, and the container.

    Mercurial names the namespace too (its lock.py). Where neither can be read it is the host.
    """
    parts = [os.uname().nodename]
    with suppress(OSError, UnicodeDecodeError):
        parts = [
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            str(os.stat("/proc/self/ns/pid").st_ino),
        ]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _find_start(process: int) -> int | None:
    """Return when a process began, 0 where only its being there is known; None: it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
        # Behind the name, which may hold anything: the state, and as 22nd field the start.
        state, *fields = text.rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        pass
    # No such process; or one that /proc hides, or there is none.
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        return 0
    return 0
