"""Measured costs against a slow reference: the whole model in memory, one unit replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantkit.allocation import choose_schemes
from quantkit.allocation.sensitivity import measure_costs
from quantkit.blocks import Draft, solve_input_group
from quantkit.calibration.stats import accumulate, empty_moment, finish
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.numerics.activations import round_inputs
from quantkit.numerics.affine import dequantize_layer
from quantkit.records import (
    Candidate,
    Event,
    GroupPlan,
    LayerStats,
    OpenChoice,
    Plan,
    TokenWindows,
)
from quantkit.schemes import EFFORTS
from quantkit.solvers import solve_group
from tests.allocation.conftest import CPU, load_whole, make_windows, open_folder, plan_auto
from tests.helpers import make_pico_model

LENGTH = 16
COUNT = 12


def choice_of(plan: Plan) -> OpenChoice:
    assert plan.choice is not None
    return plan.choice


def measure(folder: Path, plan: Plan, windows: TokenWindows) -> tuple[tuple[float, ...], ...]:
    return measure_costs(
        open_folder(folder), plan, choice_of(plan), windows, device=CPU, tell=lambda event: None
    )


def observe_input(model: nn.Module, name: str, windows: TokenWindows, start: int) -> LayerStats:
    """Second moment of a layer's input over the windows from `start` on, by an ordinary forward."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(windows.ids[start:]), use_cache=False)
    hook.remove()
    weights = torch.from_numpy(windows.weights[start:]).flatten().unsqueeze(1)
    rows = seen[0] * weights.sqrt()
    return LayerStats(rows.T @ rows / weights.sum(), int((weights > 0).sum()))


def degrade_one(
    folder: Path, candidate: Candidate, windows: TokenWindows, choice: OpenChoice
) -> float:
    """KL(original || one unit quantized) by two forwards of the whole model."""
    model = load_whole(folder)
    ids = torch.from_numpy(windows.ids[: choice.windows, : choice.window_tokens])
    weights = torch.from_numpy(windows.weights[: choice.windows, : choice.window_tokens]).double()
    linears = [replace(linear, effort=EFFORTS["fast"]) for linear in candidate.linears]
    stats = observe_input(model, linears[0].name, windows, choice.windows)
    with torch.inference_mode():
        log_p = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        modules = [model.get_submodule(linear.name) for linear in linears]
        solved = solve_group([m.weight.clone() for m in modules], stats, linears, torch.float32)
        for module, solution in zip(modules, solved, strict=True):
            module.weight = nn.Parameter(dequantize_layer(solution.layer), requires_grad=False)
            scheme = solution.layer.scheme
            module.register_forward_pre_hook(
                lambda _, args, scheme=scheme: (round_inputs(args[0], scheme),)
            )
        log_q = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float((divergence * weights).sum() / weights.sum())


@pytest.mark.parametrize(
    ("family", "method", "candidates"),
    [
        ("llama", "gptq", ["w4a16", "w8a16", "none"]),
        ("llama", "rtn", ["w4a16", "w8a8", "fp8_dynamic"]),
        ("gemma2", "gptq", ["w4a16_asym", "none"]),
    ],
)
def test_costs_are_those_of_whole_models_with_one_unit_replaced(
    family: str, method: str, candidates: list[str], tmp_path: Path
) -> None:
    """For every unit and candidate; what stays as it is costs nothing."""
    folder = make_pico_model(
        tmp_path,
        family=family,
        hidden=32,
        intermediate=64,
        vocab=64,
        dtype="float32",
        tokenizer=False,
    )
    plan = plan_auto(open_folder(folder), COUNT, LENGTH, method=method, candidates=candidates)
    choice = choice_of(plan)
    windows = make_windows(COUNT, LENGTH, 64)

    costs = measure(folder, plan, windows)

    assert [len(row) for row in costs] == [len(candidates)] * 8
    for unit, row in zip(choice.units, costs, strict=True):
        for candidate, cost in zip(unit.candidates, row, strict=True):
            if candidate.scheme == "none":
                assert cost == 0.0
                continue
            expected = degrade_one(folder, candidate, windows, choice)
            assert expected > 0
            assert cost == pytest.approx(expected, rel=2e-3, abs=1e-10)


def as_in_an_artifact(
    folder: Path, plan: Plan, candidate: Candidate, windows: TokenWindows
) -> float:
    """KL of the model that an artifact with only this unit quantized would hold."""
    choice, model = choice_of(plan), load_whole(folder)
    linears = tuple(replace(linear, effort=EFFORTS["fast"]) for linear in candidate.linears)
    names = {linear.name for linear in linears}
    groups = [group for block in plan.blocks for group in block.groups]
    fold = next(g.fold for g in groups if names == {linear.name for linear in g.linears})
    moment = empty_moment(linears[0].in_features, CPU)
    hook = model.get_submodule(linears[0].name).register_forward_pre_hook(
        lambda _, args: accumulate(moment, args[0], None)
    )
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(windows.ids[choice.windows :]), use_cache=False)
    hook.remove()
    stats = finish(moment)
    ids = torch.from_numpy(windows.ids[: choice.windows, : choice.window_tokens])
    draft = Draft()
    with torch.inference_mode():
        log_p = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        solve_input_group(GroupPlan(linears, fold), stats, tensors, draft, torch.float32)
        changed = dict(draft.dense)
        for name, layer in draft.layers.items():
            changed[f"{name}.weight"] = dequantize_layer(layer)
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, layer=layer: (
                    round_inputs(args[0], layer.scheme, layer.input_scale),
                )
            )
        model.load_state_dict(tensors | changed)
        log_q = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    assert any(name.startswith("fold:") for name in draft.replay)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("awq+gptq", "w4a16"), ("smoothquant+gptq", "w8a8"), ("smoothquant", "w8a8_static")],
)
def test_scaled_inputs_cost_what_they_cost_in_the_artifact(
    method: str, scheme: str, tmp_path: Path
) -> None:
    """There the norm is divided and the input rounded behind it; here the input is as it was."""
    folder = make_pico_model(
        tmp_path, hidden=32, intermediate=64, vocab=64, dtype="float32", tokenizer=False
    )
    widen(folder, "model.layers.0.input_layernorm.weight")
    plan = plan_auto(open_folder(folder), COUNT, LENGTH, method=method, candidates=[scheme, "none"])
    windows = make_windows(COUNT, LENGTH, 64)

    costs = measure(folder, plan, windows)

    expected = as_in_an_artifact(folder, plan, choice_of(plan).units[0].candidates[0], windows)
    assert costs[0][0] == pytest.approx(expected, rel=5e-3)


def widen(folder: Path, norm: str) -> None:
    """Give a norm two channels that are far larger than the others."""
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[norm].clone()
    weight[[3, 17]] *= 40
    tensors[norm] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_only_counted_tokens_are_measured_and_observed(pico: Path) -> None:
    """As with `assistant_only`: the others are read, and that is all."""
    windows = make_windows(COUNT, LENGTH, 64)
    weights = windows.weights.copy()
    weights[:, : LENGTH // 2] = 0
    windows = replace(windows, weights=weights)
    plan = plan_auto(open_folder(pico), COUNT, LENGTH, method="gptq", candidates=["w4a16", "none"])
    choice = choice_of(plan)

    costs = measure(pico, plan, windows)

    expected = degrade_one(pico, choice.units[1].candidates[0], windows, choice)
    assert costs[1][0] == pytest.approx(expected, rel=2e-3)


def test_several_passes_give_the_same_costs_as_one(pico: Path) -> None:
    """To the last bit: each stream is computed on its own."""
    plan = plan_auto(open_folder(pico), COUNT, LENGTH, method="gptq")
    choice = choice_of(plan)
    apart = replace(plan, choice=replace(choice, passes=((0, 1), (1, 2))))
    windows = make_windows(COUNT, LENGTH, 64)
    assert choice.passes == ((0, 2),)

    assert measure(pico, apart, windows) == measure(pico, plan, windows)


def test_blocks_without_open_layers_are_passed_by(pico: Path) -> None:
    """Before, between and behind those that are measured."""
    plan = plan_auto(
        open_folder(pico), COUNT, LENGTH, method="gptq", ignore=["lm_head", "*.layers.0.*"]
    )
    whole = plan_auto(open_folder(pico), COUNT, LENGTH, method="gptq")
    windows = make_windows(COUNT, LENGTH, 64)

    costs = measure(pico, plan, windows)

    assert costs == measure(pico, whole, windows)[4:]


def test_progress_tells_each_block_of_each_pass(pico: Path) -> None:
    """Done never exceeds the total, and reaches it."""
    plan = plan_auto(open_folder(pico), COUNT, LENGTH, method="rtn")
    choice = replace(choice_of(plan), passes=((0, 1), (1, 2)))
    events: list[Event] = []

    measure_costs(
        open_folder(pico),
        plan,
        choice,
        make_windows(COUNT, LENGTH, 64),
        device=CPU,
        tell=events.append,
    )

    assert [(event.done, event.total) for event in events] == [(1, 3), (2, 3), (3, 3)]
    assert {event.stage for event in events} == {"allocate"}


def test_a_sensitive_unit_shows_and_is_protected(tmp_path: Path) -> None:
    """One weight of a group is huge, so the others are rounded away: it gets the first bits."""
    folder = make_pico_model(
        tmp_path, hidden=32, intermediate=64, vocab=64, dtype="float32", tokenizer=False
    )
    spoil(folder, "model.layers.1.mlp.down_proj.weight")
    plan = plan_auto(open_folder(folder), COUNT, LENGTH, method="rtn", candidates=["w4a16", "none"])

    costs = measure(folder, plan, make_windows(COUNT, LENGTH, 64))

    worst = int(np.argmax([row[0] for row in costs]))
    names = [linear.name for linear in choice_of(plan).units[worst].candidates[0].linears]
    assert names == ["model.layers.1.mlp.down_proj"]
    choice = choice_of(plan)
    small, large = (candidate.size_bytes for candidate in choice.units[worst].candidates)
    room = choice.lowest_bits + 8 * (large - small) / plan.parameters
    found = choose_schemes(
        replace(choice, target_bits=room, max_kl=None), costs, plan.parameters, 1
    )
    assert found.units[worst].chosen == "none"
    assert {unit.chosen for unit in found.units if unit is not found.units[worst]} == {"w4a16"}


def spoil(folder: Path, name: str) -> None:
    """Put an outlier into every group of 32 columns, on an input that is nearly zero."""
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[name].clone()
    gate = "model.layers.1.mlp.up_proj.weight"
    tensors[gate] = tensors[gate].clone()
    for column in range(0, weight.shape[1], 32):
        weight[:, column] = 50.0
        tensors[gate][column] *= 1e-4
    tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("method", "error"), [("gptq", CalibrationError), ("rtn", CheckpointError)]
)
def test_a_model_that_overflows_is_refused(
    method: str, error: type[Exception], tmp_path: Path
) -> None:
    """With or without statistics."""
    folder = make_pico_model(
        tmp_path, hidden=32, intermediate=64, vocab=64, dtype="float32", tokenizer=False
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan = plan_auto(open_folder(folder), COUNT, LENGTH, method=method)

    with pytest.raises(error, match=r"not finite .*check the checkpoint"):
        measure(folder, plan, make_windows(COUNT, LENGTH, 64))
