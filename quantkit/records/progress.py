"""What long work says while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One step of progress: `done` of `total` in `stage`, with a word about it."""

    stage: str
    done: int
    total: int
    message: str = ""


Progress = Callable[[Event], None]
"""What long work calls after each step; the caller decides how it looks."""
