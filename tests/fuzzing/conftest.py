"""What the cases of a reader are made from, once for all tests of a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzzing.reader import Reader
from tests.fuzzing.running import read_samples


@pytest.fixture(scope="session")
def samples_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Reader], Path]:
    """Return the folder of a reader's samples, each of which was accepted."""
    made: dict[str, Path] = {}

    def find(reader: Reader) -> Path:
        if reader.name not in made:
            place = tmp_path_factory.mktemp(reader.name).resolve()
            (place / "samples").mkdir()
            reader.build(place / "samples")
            read_samples(reader, place / "samples", place / "sound")
            made[reader.name] = place / "samples"
        return made[reader.name]

    return find
