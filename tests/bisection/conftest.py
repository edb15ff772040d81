"""A model, a text, and one sound artifact."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bisection.artifacts import edit, round_plainly, spread
from tests.helpers import make_pico_model, pico_text


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original."""
    return edit(make_pico_model(tmp_path_factory.mktemp("bisection") / "model", layers=3), spread)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is measured on."""
    path = tmp_path_factory.mktemp("bisection") / "evaluation.txt"
    path.write_text(pico_text(900, seed=5))
    return path


@pytest.fixture(scope="session")
def sound(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that is as good as its bits; its KL is 0.07 nats."""
    output = tmp_path_factory.mktemp("bisection") / "sound"
    return round_plainly(model, output, {"scheme": "w4a16", "group_size": 32})
