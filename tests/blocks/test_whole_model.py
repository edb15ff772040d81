"""What is known of the whole model reaches the rounding of a group: drift and Fisher matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.blocks import Draft, solve_input_group
from quantkit.checkpoint.reader import read_tensor
from quantkit.records import LayerStats
from tests.calibration.test_walk import make_recipe, open_model
from tests.helpers import make_pico_model
from tests.solvers.cases import make_moment

NAMES = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def solve_first_group(
    folder: Path, method: str, stats: LayerStats, fishers: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Original and decoded weights of the first group."""
    overrides = [{"match": "*.k_proj", "method": "rtn"}] if method == "gptq" else []
    checkpoint, plan = open_model(folder, make_recipe(method=method, overrides=overrides))
    tensors = {f"{name}.weight": read_tensor(checkpoint, f"{name}.weight") for name in NAMES}
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = read_tensor(checkpoint, norm)
    draft = Draft()
    live = solve_input_group(
        plan.blocks[0].groups[0], stats, tensors, draft, torch.bfloat16, fishers
    )
    assert all(record.fallback is None for record in draft.records)
    return {name: tensor.float() for name, tensor in tensors.items()}, live


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_weights_follow_the_drift_of_their_input(tmp_path: Path, method: str) -> None:
    """An input that lost a tenth is answered by weights that are larger; plain rounding is not."""
    folder = make_pico_model(tmp_path / "model")
    moment = make_moment(64, 0)
    sample = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    sample = sample @ torch.linalg.cholesky(moment).T
    stats = LayerStats(
        moment, 1 << 20, sample=sample, drift=0.1 * moment, drift_sample=0.1 * sample
    )

    weights, live = solve_first_group(folder, method, stats, {})

    for name, weight in weights.items():
        if name not in live:
            continue
        plain = "k_proj" in name and method == "gptq"
        growth = float((live[name] @ moment * weight).sum() / (weight @ moment * weight).sum())
        assert growth == pytest.approx(1.0 if plain else 1.1, abs=0.02), name


def test_fisher_matrices_couple_the_rows_of_their_layer(tmp_path: Path) -> None:
    """The errors of two rows that act as one cancel."""
    folder = make_pico_model(tmp_path / "model")
    stats = LayerStats(make_moment(64, 0), 1 << 20)
    name = NAMES[0]
    fisher = torch.zeros(64, 64)
    fisher[:2, :2] = 1.0
    sums = []
    for fishers in ({}, {name: fisher}):
        weights, live = solve_first_group(folder, "gptq", replace(stats), fishers)
        error = (weights[f"{name}.weight"] - live[f"{name}.weight"])[:2].sum(dim=0)
        sums.append(float(error @ stats.second_moment @ error))
    assert sums[1] < 0.7 * sums[0]
