"""Solved encoders: each step lowers its own error, and the whole is nearer to the original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.encoders.model import run_encoder
from quantkit.encoders.observing import observe
from quantkit.encoders.sensitivity import AUTO_ERROR
from quantkit.encoders.simulation import simulated
from quantkit.encoders.solving import solve_encoder
from quantkit.errors import CalibrationError
from quantkit.recipe import CalibrationSpec, ExportSpec
from quantkit.records import Event, SolvedEncoder, TextRows
from tests.encoders.cases import Case, make_case, texts_behind

SCHEMES = ("w8a8", "w8a8_static")
METHODS = ("rtn", "gptq", "smoothquant", "smoothquant+gptq")


def _silent(_event: Event) -> None:
    pass


def _solve(case: Case, rows: TextRows | None = None, **export: Any) -> SolvedEncoder:
    spec = ExportSpec(format="onnx", **{"float_layers": 0, **export})
    stats = observe(case.model, case.plan, case.rows)
    calibration = CalibrationSpec(data="calibration.txt")
    return solve_encoder(case.model, case.plan, stats, rows, spec, calibration, _silent)


def _outlying(folder: Path, **changes: Any) -> Case:
    """An encoder whose norms make two channels twenty times as large as the others."""
    case = make_case(folder, **changes)
    for name, parameter in case.model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            parameter[3:5] *= 20.0
        elif name.endswith(
            ("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")
        ):
            parameter[:, 3:5] /= 20.0
    return case


def _embed(model: nn.Module, case: Case, rows: TextRows) -> Tensor:
    vectors = []
    for ids in rows.ids:
        ones = torch.ones(1, len(ids), dtype=torch.int64)
        batch = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": ones,
            "token_type_ids": torch.zeros_like(ones),
        }
        vectors.append(run_encoder(model, case.plan.info, batch))
    return torch.cat(vectors)


def _distance(case: Case, solved: SolvedEncoder) -> float:
    """Mean of 1 - cosine on texts that calibration has not seen."""
    texts = texts_behind(case)
    plain = _embed(case.model, case, texts)
    with simulated(case.model, solved.layers, solved.tables) as model:
        found = _embed(model, case, texts)
    return float(1 - nn.functional.cosine_similarity(plain, found, dim=-1).mean())


def _sum(values: Sequence[float | None]) -> float:
    return sum(value for value in values if value is not None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_best_is_nearer_to_the_original_than_plain_rounding(scheme: str, tmp_path: Path) -> None:
    """Where a few channels are much larger than the rest, three times nearer."""
    distances = {}
    for method in ("rtn", "best"):
        case = _outlying(tmp_path / method, scheme=scheme, method=method)
        distances[method] = _distance(case, _solve(case))
    assert distances["best"] < distances["rtn"] / 3


def test_every_step_lowers_its_own_error(tmp_path: Path) -> None:
    """gptq that of the weights, smoothing that with rounded inputs; records say so."""
    errors = {}
    for method in METHODS:
        case = _outlying(tmp_path / method, method=method)
        records = _solve(case).records
        errors[method] = (
            _sum([record.relative_error for record in records]),
            _sum([record.activation_error for record in records]),
        )
        plain = _sum([record.rtn_activation_error for record in records])
        assert plain == pytest.approx(errors["rtn"][1], rel=1e-4)
    assert errors["gptq"][0] < 0.9 * errors["rtn"][0]
    assert errors["smoothquant"][1] < 0.5 * errors["rtn"][1]
    assert errors["smoothquant+gptq"][0] < errors["smoothquant"][0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["DistilBertForSequenceClassification", "ModernBertModel"])
def test_other_families_are_solved(architecture: str, scheme: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture, scheme)
    solved = _solve(case)
    assert [layer.name for layer in solved.layers] == [
        linear.name for group in case.plan.groups for linear in group.linears
    ]
    assert [table.name for table in solved.tables] == list(case.plan.tables)
    assert all((layer.input_scale is None) == (scheme == "w8a8") for layer in solved.layers)
    corrected = {record.name for record in solved.records if record.bias_corrected}
    assert corrected == {layer.name for layer in solved.layers if layer.bias is not None}


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_no_static_range_costs_more_than_the_whole_one(method: str, tmp_path: Path) -> None:
    """What is not followed says so in the record."""
    case = _outlying(tmp_path, scheme="w8a8_static")
    stats = observe(case.model, case.plan, case.rows)
    spec = ExportSpec(format="onnx", float_layers=0)
    costs, ranges = {}, {}
    for name in ("minmax", method):
        calibration = CalibrationSpec.model_validate(
            {"data": "calibration.txt", "range": name, "percentile": 99}
        )
        solved = solve_encoder(case.model, case.plan, stats, None, spec, calibration, _silent)
        costs[name] = _sum([record.activation_error for record in solved.records])
        ranges[name] = [layer.input_scale for layer in solved.layers]
        notes = [record.fallback or "" for record in solved.records]
        followed = [f"range minmax: {method}" not in note for note in notes]
        assert name != "minmax" or all(followed)
    assert costs[method] < 1.1 * costs["minmax"]
    for one, whole, taken in zip(ranges[method], ranges["minmax"], followed, strict=True):
        assert one <= whole if taken else one == whole


def test_layers_of_a_group_share_their_input(tmp_path: Path) -> None:
    case = _outlying(tmp_path, scheme="w8a8_static")
    solved = _solve(case)
    by_group: dict[str, list[Any]] = {}
    for layer in solved.layers:
        by_group.setdefault(layer.group, []).append(layer)
    assert any(len(layers) == 3 for layers in by_group.values())
    for first, *others in by_group.values():
        for other in others:
            assert (other.input_scale, other.input_zero_point) == (
                first.input_scale,
                first.input_zero_point,
            )
            assert (first.smoothing is None) == (other.smoothing is None)
            assert first.smoothing is None or torch.equal(first.smoothing, other.smoothing)


def test_weights_are_what_scale_codes_and_smoothing_say(tmp_path: Path) -> None:
    case = _outlying(tmp_path)
    solved = _solve(case)
    assert any(layer.smoothing is not None for layer in solved.layers)
    for layer in solved.layers:
        weight = case.model.get_submodule(layer.name).get_parameter("weight")
        decoded = layer.scale.unsqueeze(1) * layer.codes
        step = layer.scale.unsqueeze(1)
        if layer.smoothing is not None:
            decoded, step = decoded / layer.smoothing, step / layer.smoothing
        # Error compensation may move a weight by more than half a step.
        assert float(((decoded - weight).abs() / step).mean()) < 1.0


@pytest.mark.parametrize("method", ["rtn", "best"])
def test_a_reduced_range_has_codes_of_seven_bits(method: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, method=method)
    for reduce_range, largest in ((True, 64), (False, 128)):
        layers = _solve(case, reduce_range=reduce_range).layers
        found = max(int(layer.codes.short().abs().max()) for layer in layers)
        assert largest // 2 < found <= largest


def test_solving_twice_gives_the_same(tmp_path: Path) -> None:
    case = _outlying(tmp_path)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    first, second = (_solve(case, case.rows, float_layers="auto") for _ in range(2))
    for one, other in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)
    assert first.records == second.records
    assert (first.float_layers, first.notes) == (second.float_layers, second.notes)
    after = case.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dead_channels_and_dead_rows_are_no_trouble(scheme: str, tmp_path: Path) -> None:
    """An input that is always zero, and output features without a weight."""
    case = make_case(tmp_path, scheme=scheme)
    for name, parameter in case.model.named_parameters():
        if "LayerNorm" in name:
            parameter[5] = 0.0
        elif name.endswith("dense.weight"):
            parameter[2] = 0.0
    solved = _solve(case)
    assert all(bool(layer.scale.isfinite().all()) for layer in solved.layers)
    assert _distance(case, solved) < 0.01


def test_rows_of_tables_have_their_own_scales(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    table = _solve(case).tables[0]
    weight = case.model.get_submodule(table.name).get_parameter("weight")
    error = (table.codes.float() * table.scale.unsqueeze(1) - weight).abs()
    assert bool((error <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all())


def test_a_damaged_layer_stays_in_float(tmp_path: Path) -> None:
    """A huge weight in each row, for a channel that is always zero, takes the others' precision."""
    case = make_case(tmp_path, method="rtn")
    name = "encoder.layer.1.attention.output.dense"
    value = case.model.get_submodule("encoder.layer.1.attention.self.value")
    value.get_parameter("weight")[0] = 0.0
    value.get_parameter("bias")[0] = 0.0
    case.model.get_submodule(name).get_parameter("weight")[:, 0] = 3000.0
    solved = _solve(case, case.rows, float_layers="auto")
    assert solved.float_layers == (name,)
    assert name not in {layer.name for layer in solved.layers}
    assert name not in {record.name for record in solved.records}
    assert any("left in float" in note for note in solved.notes)
    assert _solve(case, case.rows, float_layers=1).float_layers == (name,)


def test_nothing_stays_in_float_without_need(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    solved = _solve(case, case.rows, float_layers="auto")
    assert solved.float_layers == ()
    assert _distance(case, solved) < AUTO_ERROR
    assert len(_solve(case, case.rows, float_layers=3).float_layers) == 3


def test_what_cannot_be_solved_is_named(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    spec = ExportSpec(format="onnx")
    with pytest.raises(CalibrationError, match=r"query.* needs calibration texts"):
        solve_encoder(case.model, case.plan, None, None, spec, None, _silent)
    with pytest.raises(CalibrationError, match="float_layers 2"):
        _solve(case, None, float_layers=2)
    name = case.plan.groups[2].linears[0].name
    case.model.get_submodule(name).get_parameter("weight")[0, 0] = torch.nan
    stats = observe(make_case(tmp_path / "again").model, case.plan, case.rows)
    with pytest.raises(CalibrationError, match=f"weight of {name} is not finite"):
        solve_encoder(case.model, case.plan, stats, None, spec, None, _silent)


def test_rtn_needs_no_data(tmp_path: Path) -> None:
    case = make_case(tmp_path, method="rtn")
    spec = ExportSpec(format="onnx")
    solved = solve_encoder(case.model, case.plan, None, None, spec, None, _silent)
    assert len(solved.layers) == 12
    assert all(layer.smoothing is None and layer.clip is None for layer in solved.layers)
    assert all(record.relative_error is None for record in solved.records)
    assert any("not measured" in note for note in solved.notes)
