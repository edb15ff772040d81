"""Schemes chosen from given costs, and the choice in a job's workspace."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.allocation import allocate, choose_schemes, load_allocation, store_allocation
from quantkit.errors import RecipeError
from quantkit.records import Allocation, OpenChoice, Plan
from quantkit.workspace import open_workspace
from tests.allocation.conftest import CPU, make_windows, open_folder, plan_auto

SCHEMES = ("w4a16", "w8a16", "none")


def open_plan(pico: Path, **quantize: object) -> tuple[Plan, OpenChoice]:
    settings = {"max_kl": None, "target_bits": 12.0, "method": "rtn", **quantize}
    plan = plan_auto(open_folder(pico), 4, 16, **settings)
    assert plan.choice is not None
    return plan, plan.choice


def draw_costs(choice: OpenChoice) -> list[list[float]]:
    """Costs of different sizes: unit 2 is by far the most sensitive."""
    scales = [3e-3 / (1 + number) for number in range(len(choice.units))]
    scales[2] = 0.5
    return [[scale, scale / 300, 0.0] for scale in scales]


def bits_of(allocation: Allocation, choice: OpenChoice, parameters: int) -> float:
    sizes = sum(
        cost.size_bytes
        for unit in allocation.units
        for cost in unit.costs
        if cost.scheme == unit.chosen
    )
    return 8 * (choice.fixed_bytes + sizes) / parameters


def kl_of(allocation: Allocation) -> float:
    return math.fsum(
        cost.kl for unit in allocation.units for cost in unit.costs if cost.scheme == unit.chosen
    )


@pytest.mark.parametrize("step", range(9))
def test_target_bits_are_kept_and_used(pico: Path, step: int) -> None:
    """Never more, and less only by what no other choice could use."""
    plan, choice = open_plan(pico)
    target = choice.lowest_bits + step / 8 * (choice.highest_bits - choice.lowest_bits)
    choice = replace(choice, target_bits=target)

    found = choose_schemes(choice, draw_costs(choice), plan.parameters, 64)

    assert found.predicted_bits == pytest.approx(bits_of(found, choice, plan.parameters))
    assert found.predicted_kl == pytest.approx(kl_of(found))
    assert found.predicted_bits <= target + 1e-9
    for unit in found.units:
        chosen = next(cost for cost in unit.costs if cost.scheme == unit.chosen)
        for other in unit.costs:
            added = 8 * (other.size_bytes - chosen.size_bytes) / plan.parameters
            assert other.kl >= chosen.kl or found.predicted_bits + added > target


def test_the_sensitive_unit_is_protected(pico: Path) -> None:
    """It is the first to get more bits."""
    plan, choice = open_plan(pico)
    step = choice.units[2].candidates[1].size_bytes - choice.units[2].candidates[0].size_bytes
    target = choice.lowest_bits + 8 * step / plan.parameters
    choice = replace(choice, target_bits=target)

    found = choose_schemes(choice, draw_costs(choice), plan.parameters, 64)

    assert [unit.chosen for unit in found.units] == [
        "w8a16" if number == 2 else "w4a16" for number in range(8)
    ]
    assert found.predicted_bits == pytest.approx(target)


@pytest.mark.parametrize("max_kl", [1e-5, 1e-3, 3e-3, 0.6])
def test_max_kl_is_kept_with_the_fewest_bytes(pico: Path, max_kl: float) -> None:
    """No unit could be smaller and the sum stay within the limit."""
    plan, choice = open_plan(pico, max_kl=max_kl, target_bits=None)
    costs = draw_costs(choice)

    found = choose_schemes(choice, costs, plan.parameters, 64)

    assert found.predicted_kl <= max_kl
    for unit in found.units:
        chosen = next(cost for cost in unit.costs if cost.scheme == unit.chosen)
        for other in unit.costs:
            if other.size_bytes < chosen.size_bytes:
                assert found.predicted_kl - chosen.kl + other.kl > max_kl


def test_a_max_kl_that_no_candidate_keeps_is_refused(pico: Path) -> None:
    """With what can be reached."""
    plan, choice = open_plan(pico, max_kl=1e-4, target_bits=None, candidates=["w4a16", "w8a16"])
    costs = [row[:2] for row in draw_costs(choice)]
    least = sum(row[1] for row in costs)

    with pytest.raises(RecipeError, match=rf"max_kl 0\.0001 .* add up to {least:.3g} .* add none"):
        choose_schemes(choice, costs, plan.parameters, 64)


def test_a_candidate_with_which_the_model_overflows_is_named(pico: Path) -> None:
    """It is not left out silently."""
    plan, choice = open_plan(pico)
    costs = draw_costs(choice)
    costs[3][0] = math.inf

    with pytest.raises(RecipeError, match=r"down_proj is quantized to w4a16: take it out of"):
        choose_schemes(choice, costs, plan.parameters, 64)


def test_the_same_job_chooses_the_same(pico: Path) -> None:
    """Layers that are fused are one unit and get one scheme."""
    plan, choice = open_plan(pico, method="gptq")
    windows = make_windows(4, 16, 64)

    found = [
        allocate(open_folder(pico), plan, choice, windows, device=CPU, tell=lambda _: None)
        for _ in range(2)
    ]

    assert found[0] == found[1]
    assert found[0].tokens == 2 * 16
    assert [[name.rpartition(".")[2] for name in unit.layers] for unit in found[0].units[:4]] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_a_stored_choice_comes_back_as_it_was(pico: Path, tmp_path: Path) -> None:
    """To the last bit of its numbers."""
    plan, choice = open_plan(pico)
    found = choose_schemes(choice, draw_costs(choice), plan.parameters, 64)
    workspace = open_workspace(tmp_path, {}, restart=False)
    assert load_allocation(workspace) is None

    store_allocation(workspace, found)

    assert load_allocation(workspace) == found


def test_a_damaged_choice_is_made_again_without_the_blocks(pico: Path, tmp_path: Path) -> None:
    """Blocks that were solved for a choice that is lost cannot be trusted."""
    plan, choice = open_plan(pico)
    found = choose_schemes(choice, draw_costs(choice), plan.parameters, 64)
    workspace = open_workspace(tmp_path, {}, restart=False)
    store_allocation(workspace, found)
    path = workspace.folder / "allocation.json"
    (workspace.folder / "block-00000-0123456789abcdef.safetensors").touch()

    document = json.loads(path.read_text())
    document["allocation"]["units"][0]["chosen"] = "none"
    for text in (json.dumps(document), "{", "[]", ""):
        path.write_text(text)
        assert load_allocation(workspace) is None

    store_allocation(workspace, found)
    assert not list(workspace.folder.glob("block-*"))
    assert load_allocation(workspace) == found
