"""The store of the baseline's answers as a gate uses it, and as a user looks after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import ArtifactError, OutputError
from quantkit.judging.baseline import entries
from quantkit.judging.baseline.entries import Kept
from quantkit.judging.baseline.folder import (
    BYTES_VARIABLE,
    check_folder,
    find_bound,
    find_folder,
    find_limit,
    make_folder,
)

SPARE_SHARE = 16
"""This part of the room is filled before the entries are counted anew: a task has thousands of
answers, and each would count all before it. Other runs may fill as much meanwhile."""


@dataclass(frozen=True)
class StoreSize:
    """How much the store holds."""

    folder: Path
    entries: int
    bytes: int
    bound: int
    """Bytes that it may have at the most; 0 where it is switched off."""


@dataclass(frozen=True)
class Draft:
    """An answer that is about to be kept."""

    key: str
    answer: Mapping[str, Any]
    unfinished: Path


@dataclass
class _Uses:
    """What one gate took from the store."""

    asked: int = 0
    reused: int = 0
    days: set[str] = field(default_factory=set)
    versions: str = ""


class AnswerStore:
    """The store during one run. Its failures are notes: a gate goes on without it."""

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._own: dict[str, int] = {}
        self._spare = 0
        self._keeps_data = True
        self._keeps = True
        self._uses = _Uses()
        self._said: set[str] = set()
        self._notes: list[str] = []

    def open(self) -> None:
        """Make the folder; clear away what ended processes left, and what is beyond the bound."""
        if self._folder is None:
            return
        try:
            make_folder(self._folder)
            entries.remove_stale(self._folder)
            with entries.locked(self._folder) as held:
                if held:
                    entries.make_room(self._folder, 0, find_bound(self._folder, self._limit), ())
        except OutputError as error:
            self._folder = None
            self.say(f"the baseline's answers are not kept: {error}")
        except OSError as error:
            self._stop_keeping(error)

    def recall(self, key: str, file: Path | None = None) -> Kept | None:
        """Return what is kept as `key` and put its data in `file`; None where there is nothing.

        A damaged entry is removed and not returned.
        """
        if self._folder is None:
            return None
        try:
            kept = entries.read_entry(self._folder, key, file)
        except ArtifactError as error:
            self.forget(key)
            self.say(f"a kept answer of the baseline was damaged and is computed again: {error}")
            return None
        except OSError:
            # The worker that is asked instead says what is wrong with the place of the file.
            return None
        if kept is not None:
            self._own[key] = kept.size
        return kept

    def start(self, key: str, answer: Mapping[str, Any], file: Path | None = None) -> Draft | None:
        """Take hold of an answer, its file included; None where it is not to be kept."""
        if self._folder is None or not self._keeps or not (self._keeps_data or file is None):
            return None
        try:
            return Draft(key, answer, entries.start_entry(self._folder, file))
        except OSError as error:
            self._stop_keeping(error)
            return None

    def finish(self, draft: Draft) -> None:
        """Keep what was taken hold of, in the place of what was not used for longest."""
        assert self._folder is not None
        try:
            size = entries.finish_entry(draft.unfinished, draft.answer)
            with entries.locked(self._folder) as held:
                if self._has_room(size, held):
                    entries.publish(draft.unfinished, draft.key)
                    self._own[draft.key] = size
        except OSError as error:
            self._stop_keeping(error)
        finally:
            entries.drop(draft.unfinished)

    def forget(self, key: str) -> None:
        """Remove an entry, as far as that is possible."""
        if self._folder is not None:
            with suppress(OSError):
                entries.remove_entry(self._folder, key)

    def expect(self, size: int) -> None:
        """Say beforehand how many bytes of logits a gate will ask for, windows x T x V x 4.

        A baseline that is larger than the store would drive everything else out of it and then not
        be complete: none of its logits are kept.
        """
        if self._folder is None:
            return
        try:
            bound = find_bound(self._folder, self._limit)
        except OSError as error:
            self._stop_keeping(error)
            return
        self._keeps_data = size <= bound
        if not self._keeps_data:
            self._say_too_large(size, bound)

    def count(self, kept: Kept | None, versions: str) -> None:
        """Count a request, answered with what was kept or, None, by the model."""
        self._uses.asked += 1
        self._uses.versions = versions
        if kept is not None:
            self._uses.reused += 1
            self._uses.days.add(kept.computed)

    def say(self, note: str) -> None:
        """Remember a note; each is told once in a run."""
        if note not in self._said:
            self._said.add(note)
            self._notes.append(note)

    def take_notes(self) -> tuple[str, ...]:
        """Return what the evidence of the gate that ends here has to say, and begin the next."""
        uses, self._uses = self._uses, _Uses()
        notes, self._notes = self._notes, []
        if uses.reused:
            first, last = min(uses.days), max(uses.days)
            days = f"on {first}" if first == last else f"from {first} to {last}"
            versions = f" by {uses.versions}" if uses.versions else ""
            notes.insert(
                0,
                f"{uses.reused} of {uses.asked} answers of the baseline were not computed again: "
                f"they were kept, computed {days}{versions} from the same files",
            )
        return tuple(notes)

    def _has_room(self, size: int, held: bool) -> bool:
        """Whether an entry may be added, after old ones were removed for it."""
        assert self._folder is not None
        if held and size <= self._spare:
            self._spare -= size
            return True
        bound = find_bound(self._folder, self._limit)
        if sum(self._own.values()) + size > bound:
            self._keeps_data = False
            self._say_too_large(sum(self._own.values()) + size, bound)
            return False
        if not held:
            self.say(
                f"an answer of the baseline was not kept: {self._folder} cannot be locked, or "
                "another process holds its lock"
            )
            return False
        left = entries.make_room(self._folder, size, bound, self._own)
        self._spare = max(0, left) // SPARE_SHARE
        return left >= 0

    def _say_too_large(self, size: int, bound: int) -> None:
        self.say(
            f"not all of the baseline's answers are kept: {size:,} bytes or more are wanted and "
            f"{bound:,} allowed ({BYTES_VARIABLE}, and a tenth of the free space)"
        )

    def _stop_keeping(self, error: OSError) -> None:
        self._keeps = False
        self.say(
            f"the baseline's answers are not kept: cannot write in {self._folder}: "
            f"{error.strerror or error}"
        )


def open_store(enabled: bool) -> AnswerStore | None:
    """Open the store of this user; None where it is not wanted, by the recipe or environment.

    Raises:
        InputError: QUANTKIT_CACHE_BYTES is not a number.
    """
    limit = find_limit(os.environ)
    if not enabled or limit == 0:
        return None
    try:
        store = AnswerStore(find_folder(os.environ), limit)
    except OutputError as error:
        store = AnswerStore(None, limit)
        store.say(str(error))
    store.open()
    return store


def describe_store() -> StoreSize:
    """Return how much the store holds.

    Raises:
        InputError: QUANTKIT_CACHE_BYTES is not a number.
        OutputError: the store's folder is not one of our own, or cannot be read.
    """
    folder, limit = find_folder(os.environ), find_limit(os.environ)
    if not check_folder(folder):
        return StoreSize(folder, 0, 0, limit)
    return _reading(folder, lambda: _measure(folder, limit))


def clear_store() -> StoreSize:
    """Remove everything that is kept; return what there was. Raises as `describe_store`."""
    found = describe_store()

    def remove() -> StoreSize:
        entries.remove_stale(found.folder)
        with entries.locked(found.folder):
            for entry in entries.list_entries(found.folder):
                entries.remove_entry(found.folder, entry.key)
        return found

    return _reading(found.folder, remove) if found.entries else found


def _measure(folder: Path, limit: int) -> StoreSize:
    kept = entries.list_entries(folder)
    bound = find_bound(folder, limit)
    return StoreSize(folder, len(kept), sum(entry.size for entry in kept), bound)


def _reading(folder: Path, work: Callable[[], StoreSize]) -> StoreSize:
    try:
        return work()
    except OSError as error:
        raise OutputError(
            f"cannot read or clear the kept answers in {folder}: {error.strerror or error}"
        ) from error
