"""What a plan says about a GGUF file of the type `auto` from headers alone."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import PlanError
from quantkit.job import plan_job
from quantkit.planning.auto import _moment_bytes
from quantkit.recipe import Recipe, validate
from quantkit.records import OpenChoice, Plan
from tests.helpers import make_pico_model

CALIBRATION = {"data": "x.txt", "samples": 8, "sequence_length": 64}
TYPES = ["Q3_K", "Q4_K", "Q8_0"]


def make_recipe(calibration: object = CALIBRATION, method: str = "best", **export: Any) -> Recipe:
    settings = {
        "format": "gguf",
        "type": "auto",
        "target_bits": 7.0,
        "candidates": TYPES,
        **export,
    }
    return validate(
        {
            "version": 1,
            "calibration": calibration,
            "quantize": {"method": method},
            "export": [settings],
        }
    )


def plan_of(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    return plan_job(recipe, checkpoint, gate=False)


def choice_of(plan: Plan) -> OpenChoice:
    assert plan.choice is not None
    return plan.choice


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """256 wide, so that every type fits, and 96 in the middle, which only small blocks fill."""
    folder = tmp_path_factory.mktemp("types") / "llama"
    make_pico_model(folder, hidden=256, intermediate=96)
    return open_checkpoint(resolve_source(str(folder)))


def test_every_layer_is_a_unit_with_the_types_that_fit_it(pico: Checkpoint) -> None:
    """Queries, keys and values share statistics, not a type."""
    plan = plan_of(pico, make_recipe(candidates=["Q3_K", "Q2_K", "Q4_K", "Q8_0"]))

    units = choice_of(plan).units
    names = [unit.candidates[0].linears[0].name for unit in units]
    assert names == [linear.name for linear in plan.linears]
    assert [unit.block for unit in units] == [0] * 7 + [1] * 7
    found = {
        name: {each.scheme: each.size_bytes for each in unit.candidates}
        for name, unit in zip(names, units, strict=True)
    }
    assert found["model.layers.1.self_attn.k_proj"] == {
        "Q3_K": 128 * 110,
        "Q2_K": 128 * 84,
        "Q4_K": 128 * 144,
        "Q8_0": 128 * 8 * 34,
    }
    # Both of the smallest types have the same stand-in.
    assert found["model.layers.1.mlp.down_proj"] == {
        "Q4_0": 256 * 3 * 18,
        "Q5_0": 256 * 3 * 22,
        "Q8_0": 256 * 3 * 34,
    }
    assert any("have Q4_0, Q5_0, Q8_0 to choose from" in note for note in plan.notes)


@pytest.mark.parametrize(("end", "kind"), [("lowest_bits", "Q4_0"), ("highest_bits", "Q8_0")])
def test_the_range_reaches_from_the_smallest_to_the_largest_types(
    end: str, kind: str, pico: Checkpoint
) -> None:
    """Its ends are the files in which all layers have the same type."""
    choice = choice_of(plan_of(pico, make_recipe(candidates=["Q5_0", "Q4_0", "Q8_0"])))
    exports = {
        "format": "gguf",
        "type": "Q4_K_M",
        "overrides": [{"match": "model.layers.*_proj.weight", "type": kind}],
    }
    same = validate({"version": 1, "calibration": CALIBRATION, "export": [exports]})

    assert getattr(choice, end) == plan_of(pico, same).bits_per_weight


def test_an_open_plan_bounds_what_the_job_can_come_to(pico: Checkpoint) -> None:
    """The file takes its target at the most, and the walk goes on with its weights."""
    plan = plan_of(pico, make_recipe())

    (file,) = plan.gguf
    assert plan.gguf_leads
    assert plan.bits_per_weight == 7.0
    assert plan.artifact_bytes == file.tensor_bytes == 7 * plan.parameters // 8
    assert len(file.candidates) == 14
    assert file.type == "auto"


def test_an_override_wins_over_the_choice(pico: Checkpoint) -> None:
    """Its tensors are not measured, and a note says so."""
    overrides = [{"match": "*.o_proj.weight", "type": "Q6_K"}]
    plan = plan_of(pico, make_recipe(overrides=overrides))

    names = {unit.candidates[0].linears[0].name for unit in choice_of(plan).units}
    assert len(names) == 12
    assert not any("o_proj" in name for name in names)
    assert plan.gguf[0].weights["model.layers.0.self_attn.o_proj.weight"] == "Q6_K"
    assert "auto: overrides, not the choice, give 2 of 14 layers their type" in plan.notes


def test_what_is_outside_of_the_blocks_has_the_types_of_a_mix(pico: Checkpoint) -> None:
    """A tied embedding is worth six bits; norms are plain numbers."""
    (file,) = plan_of(pico, make_recipe()).gguf

    assert file.types["token_embd.weight"] == "Q6_K"
    assert file.types["output_norm.weight"] == file.types["blk.1.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target_bits": 3.0}, r"target_bits 3 cannot be reached: .* bits per weight"),
        (
            {"overrides": [{"match": "model.layers.*_proj.weight", "type": "Q8_0"}]},
            "type auto has nothing to choose",
        ),
        ({"calibration": None}, "type auto measures how sensitive layers are"),
        ({"calibration": None, "method": "rtn"}, "type auto measures how sensitive layers are"),
        ({"calibration": {**CALIBRATION, "sequence_length": 4096}}, "4096 is more than"),
    ],
)
def test_what_cannot_be_chosen_is_said_before_any_work(
    settings: dict[str, Any], text: str, pico: Checkpoint
) -> None:
    """Clear and early."""
    with pytest.raises(PlanError, match=text):
        plan_of(pico, make_recipe(**settings))


def test_units_that_share_an_input_share_its_second_moment(pico: Checkpoint) -> None:
    """A block has four inputs, three of them 256 wide, and seven layers."""
    plan = plan_of(pico, make_recipe())

    assert _moment_bytes(choice_of(plan).units, plan.blocks) == (3 * 256**2 + 96**2) * 4
