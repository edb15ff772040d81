"""What is known of a reader: its real files, how they are damaged, and how they are read."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

Damage = Callable[[random.Random, bytes], bytes]
"""Makes another content of a file's; a function of its arguments alone."""

_MOST_FILES, _MOST_TIMES = 2, 3
"""That are damaged in a case, and times that each of them is."""


@dataclass(frozen=True)
class Reader:
    """Something that reads files from elsewhere, by the door that all users go through."""

    name: str
    build: Callable[[Path], None]
    """Writes real files: each folder in the given one is a sample, which `read` accepts."""
    damages: Mapping[str, Sequence[Damage]]
    """Pattern of files within a sample -> what is done to such files."""
    read: Callable[[Path], object]
    """Reads a sample's folder. What it may write lies in `work` beside the folder."""
    exit_codes: frozenset[int] = frozenset({2})
    """Of refusals: 2 for bad input; 3 for workers, 5 where a bound of memory has a name."""
    starts: frozenset[str] = frozenset()
    """Audit events of what is else refused: `subprocess.Popen`, `socket.connect` ..."""
    edit: Callable[[random.Random, Path], None] | None = None
    """Changes a sample's folder in ways that no single file shows, in one of four cases."""
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Variables that are set while cases are read."""


def list_samples(folder: Path) -> list[Path]:
    """The samples in a folder that `build` has filled, always in the same order."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def make_case(reader: Reader, number: int, samples: Path, folder: Path) -> None:
    """Write the files of case `number` to `folder`, which is made.

    Args:
        samples: the folder that the reader's `build` has filled.
    """
    draw = random.Random(f"{reader.name}:{number}")
    sample = draw.choice(list_samples(samples))
    shutil.copytree(sample, folder)
    if reader.edit is not None and draw.random() < 0.25:
        reader.edit(draw, folder)
        return
    for _ in range(1 if draw.random() < 0.8 else _MOST_FILES):
        _damage_one(reader, draw, folder)


def _damage_one(reader: Reader, draw: random.Random, folder: Path) -> None:
    found = {pattern: sorted(folder.glob(pattern)) for pattern in reader.damages}
    pattern = draw.choice([pattern for pattern, files in found.items() if files])
    file = draw.choice(found[pattern])
    content = file.read_bytes()
    for _ in range(1 if draw.random() < 0.7 else draw.randint(2, _MOST_TIMES)):
        content = draw.choice(reader.damages[pattern])(draw, content)
    file.write_bytes(content)


def overlay(reader: Reader, found: Path, samples: Path, folder: Path) -> None:
    """Write a finding that was kept to `folder`: its files lie over a sample that has such ones."""
    names = [path.relative_to(found) for path in found.rglob("*") if path.is_file()]
    fits = (each for each in list_samples(samples) if all((each / name).exists() for name in names))
    sample = next(fits, None)
    if sample is None:
        raise ValueError(f"no sample of {reader.name} has the files of {found}: {names}")
    shutil.copytree(sample, folder)
    shutil.copytree(found, folder, dirs_exist_ok=True)
