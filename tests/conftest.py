"""What holds for all tests: no network, and nothing of what the user has kept or installed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Helpers too check where Python drops assert statements (-O): before any of them is imported.
_PARTS = [entry.stem for entry in Path(__file__).parent.iterdir() if entry.stem[0] not in "_."]
pytest.register_assert_rewrite(*(f"tests.{part}" for part in _PARTS if part != "conftest"))

from tests import loopback  # noqa: E402

loopback.start()
# How fast this machine is, and what else it does, is no property of what is tested.
settings.register_profile(
    "any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--also resume`: one start for what has targets of its own in the Makefile."""
    words = "run the tests with this marker, too, which the default run leaves out"
    parser.addoption("--also", action="append", default=[], metavar="MARKER", help=words)


def pytest_configure(config: pytest.Config) -> None:
    """Widen the expression of markers, before the tests are chosen by it."""
    for marker in config.getoption("also"):
        config.option.markexpr = f"({config.option.markexpr}) or {marker}"


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """A test that tries to reach another machine fails, though what it tests may take it well."""
    before = len(loopback.refused)
    yield
    tried = loopback.refused[before:]
    assert not tried, f"only loopback may be used: {tried}"


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
