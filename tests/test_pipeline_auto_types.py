"""Whole jobs that choose the types of a GGUF file: within the bits, and the same bytes again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import quantkit
from quantkit import pipeline
from quantkit.formats.gguf.container import GgufFile, open_gguf
from quantkit.ggml_types import FILE_TYPES
from quantkit.recipe import Recipe
from quantkit.records import Event, Result
from tests.helpers import make_pico_model, pico_text


def make_job(folder: Path, *, method: str = "best", **export: object) -> Recipe:
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
            "quantize": {"method": method},
            "export": [
                {
                    "format": "gguf",
                    "type": "auto",
                    "target_bits": 7.6,
                    "candidates": ["Q4_0", "Q5_1", "Q8_0"],
                    **export,
                }
            ],
        }
    )


def run(recipe: Recipe, progress: Callable[[Event], None] | None = None) -> Result:
    return quantkit.quantize(recipe, gate=False, device="cpu", progress=progress)


def open_output(result: Result) -> GgufFile:
    return open_gguf(result.output / "gguf" / "model-auto.gguf")


def test_the_file_has_the_chosen_types_and_no_more_bits(tmp_path: Path) -> None:
    """What was predicted from headers is what lies on the disk, and the report tells it."""
    result = run(make_job(tmp_path))

    allocation, (artifact,), (plan,) = (result.plan.allocation, result.artifacts, result.plan.gguf)
    assert allocation is not None
    assert artifact.bits_per_weight == allocation.predicted_bits == result.plan.bits_per_weight
    assert 7.0 < artifact.bits_per_weight <= 7.6
    chosen = {f"{unit.layers[0]}.weight": unit.chosen for unit in allocation.units}
    assert len(chosen) == 21
    assert len(set(chosen.values())) > 1
    assert {name: plan.weights[name] for name in chosen} == chosen
    tensors = open_output(result).tensors
    assert {name: each.kind.name for name, each in tensors.items()} == dict(plan.types)
    report = (result.output / "report" / "report.md").read_text()
    assert "Why each layer has its type" in report
    card = (result.output / "gguf" / "README.md").read_text()
    assert f"quantized to a mix of {', '.join(sorted(set(chosen.values())))}" in card
    evidence = json.loads((result.output / "quantkit.json").read_text())
    assert len(evidence["allocation"]["units"]) == 21


def test_plain_rounding_needs_the_data_for_the_choice_alone(tmp_path: Path) -> None:
    """And the file is called after the type that most of its weights have."""
    result = run(make_job(tmp_path, target_bits=6.6, method="rtn"))

    plan = result.plan
    assert plan.allocation is not None
    weights: Counter[str] = Counter()
    for linear in plan.linears:
        weights[linear.ggml_types[0]] += linear.in_features * linear.out_features
    ((most, _),) = weights.most_common(1)
    assert open_output(result).find("general.file_type") == FILE_TYPES[most].number


def test_overrides_win_over_the_choice(tmp_path: Path) -> None:
    """In the blocks and outside of them."""
    overrides = [
        {"match": "*.down_proj.weight", "type": "Q5_0"},
        {"match": "*.embed_tokens.weight", "type": "Q8_0"},
    ]
    result = run(make_job(tmp_path, overrides=overrides, target_bits=8.0))

    kinds = {name: each.kind.name for name, each in open_output(result).tensors.items()}
    assert {kinds[f"blk.{block}.ffn_down.weight"] for block in range(3)} == {"Q5_0"}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert result.artifacts[0].bits_per_weight <= 8.0
    assert result.plan.allocation is not None
    assert len(result.plan.allocation.units) == 18


class _StoppedError(Exception):
    """Stands for a process that ends in the middle of its work."""


def test_a_resumed_job_goes_on_with_the_same_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not measure again, and ends in the same bytes."""
    (tmp_path / "whole").mkdir()
    expected = dict(run(make_job(tmp_path / "whole")).artifacts[0].files)
    recipe = make_job(tmp_path)

    def stop(event: Event) -> None:
        if (event.stage, event.done) == ("quantize", 1):
            raise _StoppedError

    with pytest.raises(_StoppedError):
        run(recipe, stop)
    monkeypatch.delattr(pipeline, "allocate")

    assert dict(run(recipe).artifacts[0].files) == expected
