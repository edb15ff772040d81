"""What the weights alone tell: folds are no difference, and what is sound has no flaw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.bisection.folds import find_scales
from quantkit.checkpoint.trace import InputGroup
from quantkit.records import FoldPlan
from tests.bisection.artifacts import (
    DOWN,
    NORM,
    UP,
    copy_changed,
    fill_norm,
    find_units,
    randomize,
    round_plainly,
)
from tests.helpers import pico_text


@pytest.fixture(scope="module")
def folded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound artifact with a fold at every place that has one, by the pipeline itself."""
    folder = tmp_path_factory.mktemp("folded")
    (folder / "calibration.txt").write_text(pico_text(900, seed=6))
    tree = {
        "version": 1,
        "calibration": {
            "data": str(folder / "calibration.txt"),
            "samples": 32,
            "sequence_length": 32,
        },
        "quantize": {"scheme": "w4a16", "group_size": 32, "method": "awq+gptq"},
    }
    recipe = quantkit.Recipe.model_validate(tree)
    quantkit.quantize(recipe, model=model, output=folder / "out", gate=False)
    return folder / "out" / "compressed-tensors"


def roll_scales(tensors: dict[str, Tensor]) -> None:
    """Give each row of a layer the scales of the row above."""
    tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"].roll(1, 0)


def test_what_activation_aware_scaling_folds_is_no_difference(folded: Path, model: Path) -> None:
    """Norms that took a scale are left with none of it; layers with what rounding explains."""
    units = find_units(folded, model)
    assert not [unit.flaw for unit in units.values() if unit.flaw]
    assert len(units) == 21
    assert all(unit.quantized and unit.relative_error < 0.25 for unit in units.values())
    columns = [unit.scales.columns for unit in units.values()]
    strong = [each for each in columns if each is not None and float(each.log().std()) > 0.05]
    assert len(strong) >= 15


@pytest.mark.parametrize(
    ("change", "name"), [(fill_norm, NORM), (roll_scales, DOWN), (randomize, DOWN)]
)
def test_damage_under_folds_is_named(
    change: Callable[[dict[str, Tensor]], None],
    name: str,
    folded: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    """It alone, though the folds around it have one witness less."""
    units = find_units(copy_changed(folded, tmp_path / "broken", change), model)
    assert [unit.name for unit in units.values() if unit.flaw] == [name]


@pytest.mark.parametrize("size", [0.01, 0.03, 0.3])
@pytest.mark.parametrize("factor", [0.94, 1.0])
@pytest.mark.parametrize("carried", [True, False])
def test_a_norm_is_believed_where_its_layers_carry_its_scale(
    size: float, factor: float, carried: bool
) -> None:
    """Also where s is small beside the rounding, which takes 2 % off each weight."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    names = ("gate", "up")
    base = {name: normal(192, 128) for name in names} | {"norm": 1 + 0.1 * normal(128)}
    scale = factor * torch.exp(size * normal(128))
    found = {
        name: 0.98 * (base[name] * (scale if carried else 1) + 0.15 * normal(192, 128))
        for name in names
    }
    found["norm"] = base["norm"] / scale
    scales = find_scales([InputGroup(names, FoldPlan("norm", "norm"))], found, base)
    assert ("norm" in scales) == carried
    if carried:
        for name in names:
            torch.testing.assert_close(scales[name].columns, scale)


def scatter_columns(tensors: dict[str, Tensor]) -> None:
    """Put a third of a layer's columns anywhere, as a rounding may where inputs hardly reach."""
    weight = tensors[f"{DOWN}.weight"]
    draw = torch.Generator().manual_seed(3)
    far = torch.randn(weight[:, ::3].shape, generator=draw) * 1.4 * weight.float().std()
    weight[:, ::3] = far.to(weight.dtype)


def test_columns_that_inputs_hardly_reach_are_no_flaw(model: Path, tmp_path: Path) -> None:
    """Though the layer is far from the original's and from its peers; and they hide no damage."""
    other = copy_changed(model, tmp_path / "other", scatter_columns)
    artifact = round_plainly(other, tmp_path / "out", {"scheme": "w4a16", "group_size": 32})
    units = find_units(artifact, model)
    peer = units[DOWN.replace(".1.", ".2.")]
    assert units[DOWN].relative_error > 8 * peer.relative_error
    assert not [unit.flaw for unit in units.values() if unit.flaw]
    broken = find_units(copy_changed(artifact, tmp_path / "broken", roll_scales), model)
    assert [unit.name for unit in broken.values() if unit.flaw] == [DOWN]
    assert UP in broken
