"""Groups solved one after the other: folds preserve the function, replays repeat the bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.blocks import Draft, finish_block, replay_input_group, solve_input_group
from quantkit.numerics.affine import dequantize_layer
from quantkit.records import SolvedBlock
from tests.calibration.test_walk import make_recipe, make_windows, open_model, start_walk
from tests.helpers import make_pico_model


def solve_all(folder: Path, **quantize: object) -> tuple[list[SolvedBlock], dict[str, Tensor]]:
    """Every block of a model, and the weights that the walk went on with."""
    checkpoint, plan = open_model(folder, make_recipe(**quantize))
    blocks, live = [], {}
    for stop in start_walk(checkpoint, plan, make_windows()):
        groups = [group for group in stop.block.groups if group.quantized]
        if stop.group is groups[0]:
            draft = Draft()
        weights = solve_input_group(stop.group, stop.stats, stop.tensors, draft, torch.bfloat16)
        for name, weight in weights.items():
            stop.replace(name, weight)
        live |= weights
        if stop.group is groups[-1]:
            block = finish_block(stop.block, draft)
            for group in groups:
                for name, weight in replay_input_group(group, block).items():
                    assert torch.equal(weight, live[name]), name
            blocks.append(block)
    return blocks, live


def load_float(folder: Path) -> torch.nn.Module:
    """The model of a folder in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> Tensor:
    """Of the calibration windows."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(make_windows().ids)).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym", "w8a16"])
def test_folded_blocks_compute_what_the_walk_computed(
    tmp_path: Path, family: str, scheme: str
) -> None:
    """The artifact's weights and norms give the function of the weights that the walk used."""
    folder = make_pico_model(tmp_path / "model", family=family)

    blocks, live = solve_all(folder, scheme=scheme, method="awq+gptq")

    in_walk, in_artifact = load_float(folder), load_float(folder)
    for name, weight in live.items():
        in_walk.get_submodule(name).weight.data = weight
    folds = 0
    for block in blocks:
        for layer in block.layers:
            in_artifact.get_submodule(layer.name).weight.data = dequantize_layer(layer)
        for name, tensor in block.dense.items():
            in_artifact.get_parameter(name).data = tensor.float()
        folds += sum(name.startswith("fold:") for name in block.replay)
    expected, found = logits(in_walk), logits(in_artifact)
    assert folds > 0
    # Scales that a fold divides are rounded to bfloat16 once more: 2**-9 of each weight.
    error = (found - expected).norm() / (expected - expected.mean()).norm()
    assert error < 0.01


def test_a_layer_that_keeps_its_precision_is_not_scaled_silently(tmp_path: Path) -> None:
    """No scale is folded where an unquantized layer shares the input, and the record says so."""
    folder = make_pico_model(tmp_path / "model")
    overrides = [
        {"match": "*.q_proj", "scheme": "none"},
        {"match": "*.[kv]_proj", "scheme": "none"},
    ]
    overrides += [{"match": "*.gate_proj", "method": "gptq"}]

    blocks, _ = solve_all(folder, method="awq+gptq", overrides=overrides)

    records = {record.name: record for block in blocks for record in block.records}
    up = records["model.layers.0.mlp.up_proj"]
    assert up.awq_exponent is None
    assert up.fallback is not None
    assert "shares its input" in up.fallback
    gate = records["model.layers.0.mlp.gate_proj"]
    assert "not scaled" not in (gate.fallback or "")
    assert "model.layers.0.self_attn.q_proj" not in records


def test_records_hold_both_errors(tmp_path: Path) -> None:
    """gptq's output error is below plain rounding's, which the record names beside it."""
    blocks, _ = solve_all(make_pico_model(tmp_path / "model"), method="gptq")

    for block in blocks:
        for record in block.records:
            assert record.relative_error is not None
            assert record.rtn_relative_error is not None
            assert 0 < record.relative_error <= record.rtn_relative_error
            assert record.bits_per_weight == 4.5
