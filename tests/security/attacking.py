"""Tries every attack on every carrier, in a folder whose surroundings are listed before and after.

The table in docs/security.md comes from here: `python -m tests.security.table`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from quantkit.errors import QuantkitError
from tests.security.carriers import CARRIERS, MARKS, Carrier, Models, make_models
from tests.security.names import ATTACKS, Attack, Place

PATIENCE = 60
"""Seconds after which a reader hangs. Nothing here waits for anything."""
_KEPT_OUTSIDE = ("outside", "working", "scratch")
"""Folders beside the attacked one, in which nothing may change."""


@dataclass(frozen=True)
class Outcome:
    """What came of an attack."""

    carrier: Carrier
    attack: Attack
    found: str
    """`refused`, `harmless`, `the user's`, `cannot be written`; anything else is a hole."""

    @property
    def is_hole(self) -> bool:
        """Whether something was read, written or waited for that should not be."""
        return self.found not in ("refused", "harmless", "the user's", "cannot be written")


def attack_all(
    folder: Path, carriers: Sequence[Carrier] = CARRIERS, attacks: Sequence[Attack] = ATTACKS
) -> list[Outcome]:
    """Try everything in `folder`, which is empty."""
    models = make_models(folder / "models")
    outcomes = []
    for number, carrier in enumerate(carriers):
        for attack in attacks:
            if carrier.meets(attack):
                place = folder / f"{number}"
                outcome = _attack(carrier, attack, models, place)
                if outcome is not None:
                    outcomes.append(outcome)
                shutil.rmtree(place)
    return outcomes


def _attack(carrier: Carrier, attack: Attack, models: Models, root: Path) -> Outcome | None:
    """Return what came of it; None where the attack cannot be made with a fixed name."""
    for name in ("folder", *_KEPT_OUTSIDE):
        (root / name).mkdir(parents=True)
    place = Place(root / "folder", root / "outside", carrier.base)
    carrier.prepare(place, models)
    name = attack.make(place)
    if carrier.fixed and name != carrier.base:
        return None
    before = list_surroundings(root)
    with _working_in(root):
        found = _read(carrier, place, name)
    after = list_surroundings(root)
    if before != after:
        changed = sorted({*before.items()} ^ {*after.items()})[0][0]
        found = f"CHANGED {changed}"
    return Outcome(carrier, attack, found)


def _read(carrier: Carrier, place: Place, name: str) -> str:
    try:
        with _patience():
            said, found = carrier.read(place, name), ""
    except QuantkitError as error:
        said, found = str(error), "refused"
    except UnicodeEncodeError:
        return "cannot be written"
    except TimeoutError:
        return "HANGS"
    except Exception as error:
        return f"CRASHES with {type(error).__name__}"
    if any(mark in said for mark in MARKS):
        return "the user's" if carrier.users and not found else "READ"
    return found or ("harmless" if carrier.harmless else "PASSED OVER")


def list_surroundings(root: Path) -> dict[str, str]:
    """Return path -> kind and content of all that lies in and beside the folder but for it."""
    found = {}
    for name in _KEPT_OUTSIDE:
        for path in sorted((root / name).rglob("*")):
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path.relative_to(root))] = f"{path.lstat().st_mode:o} {content}"
    known = {"folder", "copied", *_KEPT_OUTSIDE}
    return found | {path.name: "new" for path in root.iterdir() if path.name not in known}


@contextlib.contextmanager
def _working_in(root: Path) -> Iterator[None]:
    """Let relative names, the home folder and temporary files lead into the surroundings."""
    before, home = tempfile.tempdir, os.environ.get("HOME")
    tempfile.tempdir, os.environ["HOME"] = str(root / "scratch"), str(root / "working")
    try:
        with contextlib.chdir(root / "working"):
            yield
    finally:
        tempfile.tempdir = before
        if home is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = home


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Raise a TimeoutError in what waits for a pipe that nobody writes to."""

    def wake(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
