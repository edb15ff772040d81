"""What holds for all tests: none sees what the user's own gates have kept, or has installed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """Folders for the tests' own stores; what several tests share is made without one."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_CACHE", str(folder / "shared"))
        patch.setenv("QUANTKIT_CACHE_BYTES", "0")
        patch.setenv("QUANTKIT_RUNTIMES", str(folder / "runtimes"))
        yield (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_store(stores: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for this test's store, also in the processes that it starts."""
    folder = next(stores)
    monkeypatch.setenv("QUANTKIT_CACHE", str(folder))
    monkeypatch.delenv("QUANTKIT_CACHE_BYTES")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
