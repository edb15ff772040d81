"""Groups solved one after the other: folds preserve the function, replays repeat the bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.blocks.cases import load_artifact, load_walked, logits, relative_distance, solve_all
from tests.helpers import make_pico_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym", "w8a16"])
def test_folded_blocks_compute_what_the_walk_computed(
    tmp_path: Path, family: str, scheme: str
) -> None:
    """The artifact's weights and norms give the function of the weights that the walk used."""
    folder = make_pico_model(tmp_path / "model", family=family)

    solved = solve_all(folder, scheme=scheme, method="awq+gptq")

    expected = logits(load_walked(folder, solved))
    found = logits(load_artifact(folder, solved))
    assert solved.folds
    # Scales that a fold divides are rounded to bfloat16 once more: 2**-9 of each weight.
    assert relative_distance(found, expected) < 0.01


def test_a_layer_that_keeps_its_precision_is_not_scaled_silently(tmp_path: Path) -> None:
    """No scale is folded where an unquantized layer shares the input, and the record says so."""
    folder = make_pico_model(tmp_path / "model")
    overrides = [
        {"match": "*.q_proj", "scheme": "none"},
        {"match": "*.[kv]_proj", "scheme": "none"},
    ]
    overrides += [{"match": "*.gate_proj", "method": "gptq"}]

    records = solve_all(folder, method="awq+gptq", overrides=overrides).records

    up = records["model.layers.0.mlp.up_proj"]
    assert up.awq_exponent is None
    assert up.fallback is not None
    assert "shares its input" in up.fallback
    gate = records["model.layers.0.mlp.gate_proj"]
    assert "not scaled" not in (gate.fallback or "")
    assert "model.layers.0.self_attn.q_proj" not in records


def test_records_hold_both_errors(tmp_path: Path) -> None:
    """gptq's output error is below plain rounding's, which the record names beside it."""
    solved = solve_all(make_pico_model(tmp_path / "model"), method="gptq")

    for record in solved.records.values():
        assert record.relative_error is not None
        assert record.rtn_relative_error is not None
        assert 0 < record.relative_error <= record.rtn_relative_error
        assert record.bits_per_weight == 4.5
        assert record.activation_error is None
        assert not record.bias_corrected
