"""Small jobs that the tests of pipelines share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import quantkit.block_loop
from quantkit.recipe import Recipe
from tests.helpers import make_pico_model, pico_text


def make_pico_job(
    folder: Path,
    exports: tuple[Mapping[str, object], ...] = (),
    *,
    family: str = "llama",
    output: str = "out",
    quantize: Mapping[str, object],
) -> Recipe:
    """An ungated job on the model in `folder`, which is made if it is not there.

    Without exports it writes what a recipe writes by itself.
    """
    if not (folder / "model").exists():
        make_pico_model(folder / "model", family=family, layers=3)
    (folder / "calibration.txt").write_text(pico_text(900, seed=1))
    recipe = {
        "version": 1,
        "model": str(folder / "model"),
        "output": str(folder / output),
        "calibration": {
            "data": str(folder / "calibration.txt"),
            "samples": 16,
            "sequence_length": 32,
        },
        "quantize": quantize,
    }
    return Recipe.model_validate(recipe | ({"export": list(exports)} if exports else {}))


def count_walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets longer with every walk of the data through a model."""
    walks: list[int] = []
    walk = quantkit.block_loop.walk

    def count(*arguments: object, **options: object) -> Iterator[object]:
        walks.append(1)
        return walk(*arguments, **options)

    monkeypatch.setattr(quantkit.block_loop, "walk", count)
    return walks
