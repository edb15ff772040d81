"""The processes that start commands on terminals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.terminal.screen import Typist, open_typist


@pytest.fixture(scope="session")
def typist() -> Iterator[Typist]:
    """For what needs no torch."""
    with open_typist() as found:
        yield found


@pytest.fixture(scope="session")
def heavy_typist() -> Iterator[Typist]:
    """For whole jobs."""
    with open_typist("torch") as found:
        yield found
