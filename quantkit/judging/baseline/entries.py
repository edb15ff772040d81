"""Entries of the store: each appears whole or not at all, and is checked when it is read.

    <folder>/
      lock              held while entries are added and old ones removed
      <key>/            64 hexadecimal digits
        answer.json     the answer, when it was computed, and the sha256 of all of it
        data            the answer's file, where it has one; or
        halves          the same in half of the bytes (`halves`)
      writing-<node>-<process>-<random>/    an entry that is being written, or removed

Nothing is synced to the disk: what a crash leaves of an entry does not pass its check.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from quantkit.errors import ArtifactError
from quantkit.judging.baseline.halves import are_halves, read_halves, write_halves

ANSWER = "answer.json"
DATA = "data"
HALVES = "halves"
MAX_ANSWER = 1 << 22
"""Bytes of an answer's document; a larger one is damaged."""

_WRITING = "writing-"
_STALE_SECONDS = 86400.0
"""After which an unfinished entry of another machine is given up."""
_LOCK_SECONDS = 5.0
_KEY_DIGITS = 64


@dataclass(frozen=True)
class Entry:
    """One entry as it lies on the disk."""

    key: str
    size: int
    """Bytes of its files."""
    used: float
    """When it was last written or read, in seconds of the system's clock."""


@dataclass(frozen=True)
class Kept:
    """What an entry holds."""

    answer: Mapping[str, Any]
    computed: str
    """The day, as in 2026-11-29."""
    size: int


@dataclass(frozen=True)
class _Data:
    """What a document says of the file beside it."""

    name: str
    size: int
    sha256: str


def list_entries(folder: Path) -> list[Entry]:
    """Return the entries of `folder`, the least recently used one first."""
    entries = []
    for path in folder.iterdir():
        if len(path.name) != _KEY_DIGITS:
            continue
        # It may be removed by another process while it is looked at.
        with contextlib.suppress(FileNotFoundError):
            size = sum(file.lstat().st_size for file in path.iterdir())
            entries.append(Entry(path.name, size, path.stat().st_mtime))
    return sorted(entries, key=lambda entry: entry.used)


def read_entry(folder: Path, key: str, file: Path | None) -> Kept | None:
    """Return what entry `key` holds and put its data where `file` says; None where there is none.

    Raises:
        ArtifactError: the entry is damaged, or has data where none is asked for, or the reverse.
        OSError: `file` cannot be written, or the entry not be read.
    """
    place = folder / key
    try:
        content = _read_at_most(place / ANSWER, MAX_ANSWER)
        kept, data = _parse(content)
        if (data is None) != (file is None):
            raise ArtifactError(f"{place} does not hold what was asked for")
        found = None if data is None or file is None else _fetch(place, data, file)
    except FileNotFoundError:
        # An entry is removed by renaming it: it is there with all of its files, or not at all.
        if place.is_dir():
            raise ArtifactError(f"{place} lacks a file") from None
        return None
    if data is not None and file is not None and found != (data.size, data.sha256):
        file.unlink()
        raise ArtifactError(f"the data of {place} has changed")
    with contextlib.suppress(OSError):
        os.utime(place)
    return Kept(kept.answer, kept.computed, len(content) + (0 if data is None else data.size))


def start_entry(folder: Path, file: Path | None) -> Path:
    """Return a new unfinished entry with the data of `file`; `file` may be deleted afterwards.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    prefix = f"{_WRITING}{os.uname().nodename}-{os.getpid()}-"
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    try:
        if file is not None:
            link_or_copy(file, unfinished / DATA)
            (unfinished / DATA).chmod(0o600)
    except OSError:
        drop(unfinished)
        raise
    return unfinished


def finish_entry(unfinished: Path, answer: Mapping[str, Any]) -> int:
    """Write the answer of an unfinished entry; return the bytes of all of it.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    try:
        data = _settle_data(unfinished)
        body = {
            "answer": dict(answer),
            "computed": time.strftime("%Y-%m-%d", time.gmtime()),
            "data": None if data is None else asdict(data),
        }
        content = json.dumps({"body": body, "sha256": digest_body(body)}).encode()
        with open(unfinished / ANSWER, "xb", opener=_private) as handle:
            handle.write(content)
    except OSError:
        drop(unfinished)
        raise
    return len(content) + (0 if data is None else data.size)


def publish(unfinished: Path, key: str) -> None:
    """Let a finished entry appear as `key`; one that is there already stays, and this one goes.

    Raises:
        OSError: it cannot be renamed.
    """
    try:
        unfinished.rename(unfinished.with_name(key))
    except OSError:
        if not unfinished.with_name(key).is_dir():
            raise
    finally:
        drop(unfinished)


def remove_entry(folder: Path, key: str) -> None:
    """Remove an entry at one stroke; who has linked or opened its data keeps that.

    Raises:
        OSError: it cannot be removed.
    """
    grave = Path(
        tempfile.mkdtemp(prefix=f"{_WRITING}{os.uname().nodename}-{os.getpid()}-", dir=folder)
    )
    try:
        # Another process may have removed it.
        with contextlib.suppress(FileNotFoundError):
            (folder / key).rename(grave)
    finally:
        drop(grave)


def make_room(folder: Path, size: int, bound: int, keep: Collection[str]) -> int:
    """Remove the least recently used entries but `keep`, until `size` more bytes fit in `bound`.

    Returns the bytes that are left besides them; negative where they do not fit. Entries are only
    removed where that is enough.

    Raises:
        OSError: an entry cannot be removed.
    """
    entries = list_entries(folder)
    surplus = sum(entry.size for entry in entries) + size - bound
    removable = [entry for entry in entries if entry.key not in keep]
    if surplus > sum(entry.size for entry in removable):
        return -surplus
    for entry in removable:
        if surplus <= 0:
            break
        remove_entry(folder, entry.key)
        surplus -= entry.size
    return -surplus


def remove_stale(folder: Path) -> None:
    """Remove the unfinished entries of processes that have ended."""
    here = f"{_WRITING}{os.uname().nodename}-"
    for path in folder.glob(f"{_WRITING}*"):
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - path.lstat().st_mtime > _STALE_SECONDS
            process = path.name.removeprefix(here).partition("-")[0]
            dead = path.name.startswith(here) and process.isdigit() and _is_dead(int(process))
            if old or dead:
                drop(path)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of the store inside; False where the file system has none, or it is taken.

    Raises:
        OSError: the file of the lock cannot be made.
    """
    with open(folder / "lock", "ab", opener=_private) as handle:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                held = False
            except OSError:
                held = False
            break
        yield held


def drop(unfinished: Path) -> None:
    """Remove an unfinished entry, as far as that is possible."""
    shutil.rmtree(unfinished, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Put the regular file `source` at `target` too: a hard link, or a copy where none can be.

    Raises:
        OSError: `source` is not a regular file, or `target` cannot be written.
    """
    if not S_ISREG(source.lstat().st_mode):
        raise FileNotFoundError(f"{source} is not a regular file")
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        target.unlink(missing_ok=True)
        try:
            with source.open("rb") as old, open(target, "xb", opener=_private) as new:
                shutil.copyfileobj(old, new, 1 << 20)
        except OSError:
            target.unlink(missing_ok=True)
            raise


def digest_body(body: Any) -> str:
    """Return the sha256 by which the document of an entry is checked."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _settle_data(unfinished: Path) -> _Data | None:
    """Halve the data of an unfinished entry where that loses nothing, and measure it."""
    data, name = unfinished / DATA, DATA
    if not data.exists():
        return None
    if are_halves(data):
        write_halves(data, unfinished / HALVES)
        data.unlink()
        name = HALVES
    return _Data(name, *_measure(unfinished / name))


def _fetch(place: Path, data: _Data, file: Path) -> tuple[int, str]:
    """Put the data of an entry at `file`; return its size and sha256 as they lie in the store."""
    if data.name == HALVES:
        return read_halves(place / HALVES, file)
    link_or_copy(place / DATA, file)
    return _measure(file)


def _parse(content: bytes) -> tuple[Kept, _Data | None]:
    """What the document of an entry says; raises `ArtifactError` where it is damaged."""
    try:
        document = json.loads(content)
        body = document["body"]
        if document["sha256"] != digest_body(body) or body["answer"]["ok"] is not True:
            raise ArtifactError("an answer of the store has changed")
        data = None if body["data"] is None else _Data(**body["data"])
        return Kept(body["answer"], str(body["computed"]), len(content)), data
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ArtifactError("an answer of the store cannot be read") from None


def _read_at_most(path: Path, size: int) -> bytes:
    with path.open("rb") as handle:
        return handle.read(size + 1)


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return os.fstat(handle.fileno()).st_size, digest


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
