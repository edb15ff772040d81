"""Biases that take up the mean output error of their layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.blocks import Draft, solve_input_group
from quantkit.checkpoint.reader import read_tensor
from tests.blocks.cases import (
    add_outliers,
    load_artifact,
    load_float,
    load_walked,
    logits,
    relative_distance,
    solve_all,
)
from tests.calibration.test_walk import make_recipe, open_model
from tests.helpers import make_pico_model

BIASED = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_the_biases_of_a_model_are_corrected_and_no_others_made(
    tmp_path: Path, method: str
) -> None:
    """The mean output of every corrected layer is that of the original, up to bfloat16."""
    folder = make_pico_model(tmp_path / "model", family="qwen2")

    solved = solve_all(folder, method=method)

    original = load_float(folder)
    for name, record in solved.records.items():
        assert record.bias_corrected == name.endswith(BIASED)
        if not record.bias_corrected:
            assert f"{name}.bias" not in solved.live
            continue
        mean, live = solved.stats[name].mean, solved.live
        module = original.get_submodule(name)
        before = module.weight @ mean + module.bias
        after = live[f"{name}.weight"] @ mean + live[f"{name}.bias"]
        tolerance = torch.finfo(torch.bfloat16).eps * live[f"{name}.bias"].abs() + 1e-5
        assert bool(((after - before).abs() <= tolerance).all())


def test_a_corrected_bias_is_divided_by_a_later_fold(tmp_path: Path) -> None:
    """v_proj's, where o_proj's input is scaled: the walk's stays, the artifact's is divided."""
    folder = add_outliers(make_pico_model(tmp_path / "model", family="qwen2"))

    solved = solve_all(folder, scheme="w8a8", method="smoothquant+gptq")

    for block in solved.blocks:
        prefix = f"model.layers.{block.index}.self_attn"
        fold = block.replay[f"fold:{prefix}.o_proj"].reshape(2, 2, 16)[:, 0].flatten()
        walked = solved.live[f"{prefix}.v_proj.bias"]
        written = block.dense[f"{prefix}.v_proj.bias"]
        assert written.dtype == torch.bfloat16
        torch.testing.assert_close(written.float() * fold, walked, rtol=0.005, atol=0)
        assert float(fold.max()) > 2.0
    found, expected = (load(folder, solved) for load in (load_artifact, load_walked))
    assert relative_distance(logits(found), logits(expected)) < 0.01


def test_without_statistics_a_bias_stays(tmp_path: Path) -> None:
    """Nothing is known of the mean of the input."""
    folder = make_pico_model(tmp_path / "model", family="qwen2")
    checkpoint, plan = open_model(folder, make_recipe(method="rtn"))
    group, draft = plan.blocks[0].groups[0], Draft()
    names = [name for name in checkpoint.tensors if ".layers.0.self_attn." in name]
    tensors = {name: read_tensor(checkpoint, name) for name in names}

    live = solve_input_group(group, None, tensors, draft, torch.bfloat16)

    assert sorted(live) == sorted(f"{linear.name}.weight" for linear in group.linears)
    assert not draft.dense
    assert not any(record.bias_corrected for record in draft.records)
