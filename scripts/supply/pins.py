"""Reading constraints*.txt, which have versions, and locks/, which have the same with hashes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "locks"
CPU_BUILDS = LOCKS / "torch-cpu.sha256"
"""Of torch's CPU builds, which PyPI has not: `sha256  file name` a line."""

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})\b")


@dataclass(frozen=True)
class Pin:
    """One version of one package, and the files that it may be installed from."""

    name: str
    version: str
    hashes: tuple[str, ...]
    """sha256 in hexadecimal, sorted; empty in constraints."""

    @property
    def key(self) -> str:
        """The name as package indexes compare it."""
        return canonical(self.name)


def canonical(name: str) -> str:
    """Return a package's name in the one spelling of PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> list[Path]:
    """The files of tested versions that have a lock; constraints-minilm.txt has its own hash."""
    files = sorted(ROOT.glob("constraints*.txt"))
    return [path for path in files if path.name != "constraints-minilm.txt"]


def read_pins(path: Path) -> list[Pin]:
    """Return the pins of constraints or of a lock, in their order.

    Raises:
        ValueError: a line is neither a pin nor a comment.
    """
    return list(_parse(path))


def _parse(path: Path) -> Iterator[Pin]:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pin = _PIN.match(line)
        if pin is None:
            raise ValueError(f"{path}: {line!r} is no NAME==VERSION")
        yield Pin(pin["name"], pin["version"], tuple(sorted(_HASH.findall(line))))
