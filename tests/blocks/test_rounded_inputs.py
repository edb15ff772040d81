"""Schemes that round the inputs of layers: smoothing, static scales, and what records say of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from quantkit.blocks import Draft, solve_input_group
from quantkit.errors import CalibrationError
from quantkit.numerics.activations import round_inputs
from quantkit.numerics.affine import dequantize_layer
from quantkit.records import LayerStats
from quantkit.solvers import scale_stats
from quantkit.workspace import load_block, open_workspace, store_block
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

FUSED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def make_outlier_model(folder: Path, family: str = "llama") -> Path:
    """A pico model with outliers in every input."""
    return add_outliers(make_pico_model(folder, family=family))


def make_wide_model(folder: Path) -> Path:
    """A pico model with matrices of whole blocks of 128 x 128."""
    return make_pico_model(folder, hidden=256, intermediate=256, layers=1)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_outliers_of_the_tests_change_nothing(tmp_path: Path, family: str) -> None:
    """Powers of two in front and behind."""
    plain = logits(load_float(make_pico_model(tmp_path / "plain", family=family)))
    found = logits(load_float(make_outlier_model(tmp_path / "outlier", family)))

    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "w4a8"])
def test_smoothed_blocks_compute_what_the_walk_computed(
    tmp_path: Path, family: str, scheme: str
) -> None:
    """In norms, in up_proj, and in v_proj across grouped attention, biases included."""
    folder = make_outlier_model(tmp_path / "model", family)

    solved = solve_all(folder, scheme=scheme, method="smoothquant+gptq")

    expected = logits(load_walked(folder, solved))
    found = logits(load_artifact(folder, solved))
    assert len(solved.folds) == 8
    # Rows with one scale take a fold without rounding; groups of columns and biases are rounded.
    exact = scheme != "w4a8" and family != "qwen2"
    assert relative_distance(found, expected) < (1e-4 if exact else 0.01)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static"])
def test_smoothing_removes_most_of_the_error_and_the_records_say_so(
    tmp_path: Path, scheme: str
) -> None:
    """Against plain rounding of the same inputs and weights, layer by layer."""
    folder = make_outlier_model(tmp_path / "model")

    records = solve_all(folder, scheme=scheme, method="smoothquant").records

    for name, record in records.items():
        assert record.smoothing_exponent is not None
        assert record.awq_exponent is None
        assert record.activation_error is not None
        assert record.rtn_activation_error is not None
        assert record.activation_error < 0.2 * record.rtn_activation_error, name
        assert record.relative_error is not None
        assert record.relative_error < record.activation_error


def test_the_activation_error_is_that_of_the_sampled_tokens(tmp_path: Path) -> None:
    """Computed again from the artifact's layer and the walk's statistics."""
    folder = make_outlier_model(tmp_path / "model")
    solved = solve_all(folder, scheme="w8a8", method="smoothquant+gptq")
    checkpoint, _ = open_model(folder, make_recipe())
    name = "model.layers.1.mlp.gate_proj"
    original = load_float(folder).get_parameter(f"{name}.weight").data
    layer = next(layer for layer in solved.blocks[1].layers if layer.name == name)
    fold = solved.blocks[1].replay[f"fold:{name}"]
    sample = scale_stats(solved.stats[name], fold).sample

    assert sample is not None
    assert len(sample) == 6 * 16
    output = (sample * fold) @ original.T
    found = round_inputs(sample, layer.scheme) @ dequantize_layer(layer).T
    error = float((output - found).square().sum() / output.square().sum())
    assert solved.records[name].activation_error == pytest.approx(error, rel=1e-3)
    assert checkpoint.tensors[f"{name}.weight"].dtype == "BF16"


def test_a_group_that_gains_nothing_is_left_alone_and_the_record_says_so(tmp_path: Path) -> None:
    """Rounding to 16 bits is no rounding: no scale can lower the error by 2 %."""
    folder = make_pico_model(tmp_path / "model")
    overrides = [{"match": "*.o_proj", "scheme": "w8a16", "group_size": 32}]

    solved = solve_all(folder, scheme="w8a8", method="smoothquant+gptq", overrides=overrides)

    unsmoothed = [x for x in solved.records.values() if x.smoothing_exponent is None]
    assert unsmoothed
    for record in unsmoothed:
        assert record.fallback is not None
        assert "not smoothed" in record.fallback
        assert record.name not in solved.folds


@pytest.mark.parametrize("scheme", ["w8a8_static", "fp8_static"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_that_share_an_input_share_its_scale(
    tmp_path: Path, scheme: str, method: str
) -> None:
    """One scale [1] in the artifact's dtype, which covers the input or clips it for a gain."""
    solved = solve_all(make_pico_model(tmp_path / "model"), scheme=scheme, method=method)

    for block in solved.blocks:
        scales = {layer.name: layer.input_scale for layer in block.layers}
        for name, scale in scales.items():
            assert scale is not None
            assert scale.shape == (1,)
            assert scale.dtype == torch.bfloat16
            largest = solved.stats[name].absmax.max()
            assert 0 < float(scale) <= 1.01 * float(largest) / (127.5 if "w8" in scheme else 448)
        for module, leaves in FUSED:
            names = [f"model.layers.{block.index}.{module}.{leaf}" for leaf in leaves]
            assert len({float(scales[name]) for name in names}) == 1


@pytest.mark.parametrize("scheme", ["w8a8", "fp8_dynamic", "fp8_block", "w4a8_fp8"])
def test_dynamic_inputs_have_no_scale(tmp_path: Path, scheme: str) -> None:
    """The server computes it as it runs."""
    make = make_wide_model if scheme == "fp8_block" else make_pico_model

    solved = solve_all(make(tmp_path / "model"), scheme=scheme, method="gptq")

    assert all(layer.input_scale is None for block in solved.blocks for layer in block.layers)
    assert all(record.activation_error for record in solved.records.values())


def test_a_static_layer_that_no_token_reached_is_an_error(tmp_path: Path) -> None:
    """Its scale would be an invention."""
    folder = make_pico_model(tmp_path / "model")
    _, plan = open_model(folder, make_recipe(scheme="fp8_static", method="gptq"))
    group = plan.blocks[0].groups[0]
    tensors = {f"{x.name}.weight": torch.ones(x.out_features, 64) for x in group.linears}
    stats = LayerStats(torch.zeros(64, 64), 0, torch.zeros(64), torch.zeros(64), torch.empty(0, 64))

    with pytest.raises(CalibrationError, match=r"reached .*q_proj, and fp8_static stores a scale"):
        solve_input_group(group, stats, tensors, Draft(), torch.bfloat16)


@pytest.mark.parametrize(
    ("scheme", "family"), [("w8a8_static", "qwen2"), ("fp8_static", "llama"), ("fp8_block", "")]
)
def test_the_workspace_gives_back_codes_scales_and_biases(
    tmp_path: Path, scheme: str, family: str
) -> None:
    """Every dtype and every record of a stored block survives."""
    folder = tmp_path / "model"
    folder = make_outlier_model(folder, family) if family else make_wide_model(folder)
    method = "smoothquant+gptq" if family else "gptq"
    block = solve_all(folder, scheme=scheme, method=method).blocks[-1]
    workspace = open_workspace(tmp_path / "partial", {}, restart=False)

    store_block(workspace, block)
    found = load_block(workspace, block.index)

    assert found.records == block.records
    for part in ("dense", "replay"):
        stored, wanted = getattr(found, part), getattr(block, part)
        assert stored.keys() == wanted.keys()
        assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    for layer, expected in zip(found.layers, block.layers, strict=True):
        assert layer.codes.dtype == expected.codes.dtype
        for field in dataclasses.fields(layer):
            value, wanted = getattr(layer, field.name), getattr(expected, field.name)
            if isinstance(wanted, torch.Tensor):
                assert torch.equal(value.float(), wanted.float())
            else:
                assert value == wanted
