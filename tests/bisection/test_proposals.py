"""What a proposal would change is what was measured."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

from quantkit.bisection.choosing import Choice
from quantkit.bisection.proposals import propose
from quantkit.bisection.records import Form, Scales, Unit
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.formats.inspect import inspect_artifact
from tests.report.sample import make_judgement


def make_unit(block: int) -> Unit:
    """A layer with four bits."""
    name = f"model.layers.{block}.mlp.down_proj"
    form = Form("w4a16", 4, 32, 1000)
    return Unit(name, block, (f"{name}.weight",), form, Scales(), 0.1, 0.1, None, 4000)


@pytest.mark.parametrize("blocks", [(0, 1, 2), (0, 2)])
def test_a_pattern_stands_for_chosen_layers_only(
    blocks: tuple[int, ...], model: Path, sound: Path
) -> None:
    """Where one of the kind is in float, and so differs in nothing, it stays so."""
    base = open_checkpoint(resolve_source(str(model)))
    units = {unit.name: unit for unit in map(make_unit, blocks)}
    choice = Choice(dict.fromkeys(units, "w8a16"), tuple(units), "w8a16", make_judgement("PASS"), 0)
    recipe = propose(inspect_artifact(sound), choice, units, base).recipe

    patterns = [row["match"] for row in yaml.safe_load(recipe)["quantize"]["overrides"]]
    layers = [name.removesuffix(".weight") for name in base.tensors]
    matched = {name for name in layers if any(fnmatchcase(name, each) for each in patterns)}
    assert matched == set(units)
    assert len(patterns) == (1 if len(blocks) == 3 else 2)
