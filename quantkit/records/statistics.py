"""What `calibrate` leaves for `quantize`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Statistics:
    """A folder of statistics of a model; `quantize(statistics=...)` takes it as it is."""

    folder: Path
    model: str
    """What the user called it."""
    source: str
    """Of the calibration windows."""
    windows: int
    sequence_length: int
    blocks: int
    inputs: int
    """That were watched: layers that share one count once."""
    size_bytes: int
    """Of all its files."""
    lacks: tuple[str, ...]
    """What recipes may ask for that is not in it, one line each."""
    notes: tuple[str, ...]
    """What was noticed and did not stop the walk."""
    seconds: Mapping[str, float]

    def __fspath__(self) -> str:
        """Return the folder, so that the record can stand where a path is asked for."""
        return os.fspath(self.folder)
