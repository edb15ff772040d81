"""One output that passed, and a Hub of one's own for each test."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.records import Result
from quantkit.report import html
from tests.helpers import make_pico_model
from tests.hub import WRITE_TOKEN, HubServer
from tests.publishing.outputs import make_output, make_result


@pytest.fixture(scope="module", autouse=True)
def compiled_templates() -> Iterator[None]:
    """Each report is rendered as ever, from templates that are compiled once for all tests."""
    environment = html._environment()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_environment", lambda: environment)
        yield


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Of a job with three large files and some small ones; its output is not to be changed."""
    return make_result(tmp_path_factory.mktemp("passed"))


@pytest.fixture(scope="session")
def passed(result: Result) -> Path:
    """The output of that job."""
    return result.output


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of another folder's model, a smaller one; not to be changed."""
    folder = tmp_path_factory.mktemp("gguf")
    make_pico_model(folder / "model")
    return make_output(folder, {"format": "gguf", "type": "Q8_0"})


@pytest.fixture
def output(passed: Path, tmp_path: Path) -> Path:
    """A copy of the output, to be changed."""
    shutil.copytree(passed, tmp_path / "output")
    return tmp_path / "output"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that takes large files in parts, and alice's token for it."""
    with HubServer(multipart_above=500_000, part_bytes=400_000) as hub:
        hub.connect(monkeypatch, tmp_path / "home", WRITE_TOKEN)
        yield hub


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody sleeps: the seconds that somebody wanted to are in this list."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept
