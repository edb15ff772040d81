"""A whole job with `scheme: auto`: chosen, solved, written, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import quantkit
from quantkit import block_loop, pipeline
from quantkit.errors import InputError
from quantkit.formats.inspect import inspect_artifact
from quantkit.recipe import Recipe
from quantkit.records import Event, Result
from tests.helpers import make_pico_model, pico_text


def make_job(folder: Path, **quantize: object) -> Recipe:
    """An ungated job on a model of three blocks."""
    if not (folder / "model").exists():
        make_pico_model(folder / "model", hidden=32, intermediate=64, layers=3)
        (folder / "calibration.txt").write_text(pico_text(800, seed=1))
    return Recipe.model_validate(
        {
            "version": 1,
            "model": str(folder / "model"),
            "output": str(folder / "out"),
            "calibration": {
                "data": str(folder / "calibration.txt"),
                "samples": 8,
                "sequence_length": 32,
            },
            "quantize": {
                "scheme": "auto",
                "target_bits": 13.0,
                "method": "gptq",
                "group_size": 32,
                **quantize,
            },
        }
    )


def run(recipe: Recipe, progress: Callable[[Event], None] | None = None) -> Result:
    return quantkit.quantize(recipe, gate=False, device="cpu", progress=progress)


def files_of(result: Result) -> dict[str, str]:
    return dict(result.artifacts[0].files)


def test_the_artifact_has_the_chosen_schemes_and_no_more_bits(tmp_path: Path) -> None:
    """What was predicted from headers is what lies on the disk."""
    result = run(make_job(tmp_path))

    allocation = result.plan.allocation
    assert allocation is not None
    assert result.report.allocation == allocation
    artifact = result.artifacts[0]
    assert artifact.bits_per_weight == allocation.predicted_bits == result.plan.bits_per_weight
    assert artifact.bits_per_weight <= 13.0
    found = {layer.name: layer.scheme for layer in inspect_artifact(result.output).layers}
    chosen = {name: unit.chosen for unit in allocation.units for name in unit.layers}
    assert {name: found[name] for name in chosen} == chosen
    assert len(set(chosen.values())) > 1


def test_the_choice_is_part_of_the_evidence_and_of_the_reports(tmp_path: Path) -> None:
    """Costs of every candidate, and how long measuring took."""
    result = run(make_job(tmp_path))

    evidence = json.loads((result.output / "quantkit.json").read_text())
    assert len(evidence["allocation"]["units"]) == 12
    assert evidence["timings"]["seconds"]["allocate"] > 0
    report = json.loads((result.output / "report" / "report.json").read_text())
    assert report["allocation"] == evidence["allocation"]
    for name in ("report.html", "report.md"):
        text = (result.output / "report" / name).read_text()
        assert "Why each layer has its scheme" in text


class _StoppedError(Exception):
    """Stands for a process that ends in the middle of its work."""


def stop_at(stage: str, done: int) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        if (event.stage, event.done) == (stage, done):
            raise _StoppedError

    return tell


def test_a_resumed_job_goes_on_with_the_same_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not measure again, and ends in the same bytes."""
    (tmp_path / "whole").mkdir()
    expected = files_of(run(make_job(tmp_path / "whole")))
    recipe = make_job(tmp_path)
    with pytest.raises(_StoppedError):
        run(recipe, stop_at("quantize", 1))
    monkeypatch.delattr(pipeline, "allocate")
    events: list[Event] = []

    result = run(recipe, events.append)

    assert files_of(result) == expected
    messages = {event.message for event in events}
    assert "resumed with the schemes chosen before" in messages
    assert any(message.startswith("resumed after 1 block, ") for message in messages)


def test_a_job_that_was_stopped_after_the_choice_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring takes long, so it is worth keeping even before a block is solved."""
    recipe = make_job(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise _StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(block_loop, "solve_input_group", fail)
        with pytest.raises(_StoppedError):
            run(recipe)
    assert (tmp_path / "out.partial" / "workspace" / "allocation.json").is_file()
    monkeypatch.delattr(pipeline, "allocate")
    run(recipe)


def test_a_job_with_another_target_does_not_resume(tmp_path: Path) -> None:
    """The solved blocks have the schemes of the first."""
    with pytest.raises(_StoppedError):
        run(make_job(tmp_path), stop_at("quantize", 1))

    with pytest.raises(InputError, match="unfinished job that differs in plan"):
        run(make_job(tmp_path, target_bits=14.0))


def test_plain_rounding_needs_the_data_for_the_choice_alone(tmp_path: Path) -> None:
    """And the choice by divergence keeps its limit."""
    recipe = make_job(tmp_path, method="rtn", target_bits=None, max_kl=0.003)

    result = run(recipe)

    assert result.plan.allocation is not None
    assert 0 < result.plan.allocation.predicted_kl <= 0.003
