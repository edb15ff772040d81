"""What is kept and what is refused when a job cannot be judged as its recipe says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import CalibrationError, InputError, MissingPackageError
from quantkit.recipe import Recipe
from quantkit.records import Event
from tests.helpers import make_pico_model, pico_text, write_pico_tokenizer


def make_job(folder: Path, python: str) -> Recipe:
    """A job by plain rounding whose gate runs `python`."""
    make_pico_model(folder / "model", hidden=32, intermediate=64)
    (folder / "evaluation.txt").write_text(pico_text(300, seed=1))
    return Recipe.model_validate(
        {
            "version": 1,
            "model": str(folder / "model"),
            "output": str(folder / "out"),
            "quantize": {"method": "rtn", "group_size": 32},
            "gate": {
                "data": str(folder / "evaluation.txt"),
                "samples": 8,
                "sequence_length": 16,
                "probes": None,
                "python": {"transformers": python},
            },
        }
    )


def test_an_interpreter_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    """Not after hours of quantizing."""
    recipe = make_job(tmp_path, "/no/such/python")
    events: list[Event] = []

    with pytest.raises(InputError, match=r"interpreter /no/such/python: .*gate\.python"):
        quantkit.quantize(recipe, progress=events.append)

    assert {event.stage for event in events} == {"prepare"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.txt", "model"]


def test_blocks_outlive_an_interpreter_that_lacks_a_package(tmp_path: Path) -> None:
    """The recipe's gate can be mended, and the same blocks are judged then."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nwhile read line; do\n"
        """echo '{"ok": false, "kind": "package", "error": "none", "package": "torch"}'\n"""
        "done\n"
    )
    python.chmod(0o755)
    recipe = make_job(tmp_path, str(python))

    with pytest.raises(MissingPackageError, match="'torch'"):
        quantkit.quantize(recipe)
    assert not (tmp_path / "out").exists()

    events: list[Event] = []
    result = quantkit.quantize(recipe, gate=False, progress=events.append)
    assert result.verdict == "UNJUDGED"
    assert "resumed after 2 blocks, all are solved" in {event.message for event in events}
    assert not (tmp_path / "out.partial").exists()


def test_evaluation_by_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    """A gate on an artifact that exists says so too, and no worker dies of it."""
    recipe = make_job(tmp_path, sys.executable)
    quantkit.quantize(recipe, gate=False)
    write_pico_tokenizer(tmp_path / "model", vocab=400)

    for judge in (
        lambda: quantkit.quantize(recipe, overwrite=True),
        lambda: quantkit.gate(tmp_path / "out", baseline=tmp_path / "model", recipe=recipe),
    ):
        with pytest.raises(CalibrationError, match="the tokenizer is not this model's"):
            judge()
    assert not (tmp_path / "out.gate").exists()
