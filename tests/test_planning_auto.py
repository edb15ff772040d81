"""What a plan says about `scheme: auto` from headers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import PlanError
from quantkit.planning import make_plan
from quantkit.planning.auto import _split_into_passes
from quantkit.recipe import Recipe, validate
from quantkit.records import AllocatedUnit, Allocation, OpenChoice, Plan
from tests.helpers import make_pico_model

CALIBRATION = {"data": "x.txt", "samples": 8, "sequence_length": 64}


def make_recipe(calibration: object = CALIBRATION, **quantize: Any) -> Recipe:
    settings = {"scheme": "auto", "target_bits": 9.0, "group_size": 32, **quantize}
    return validate({"version": 1, "quantize": settings, "calibration": calibration})


def plan_of(recipe: Recipe, checkpoint: Checkpoint, **options: Any) -> Plan:
    return make_plan(recipe, checkpoint, gate=False, **options)


def choice_of(recipe: Recipe, checkpoint: Checkpoint) -> OpenChoice:
    found = plan_of(recipe, checkpoint).choice
    assert found is not None
    return found


def problems_of(recipe: Recipe, checkpoint: Checkpoint) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        plan_of(recipe, checkpoint)
    return caught.value.problems


def unit_names(choice: OpenChoice) -> list[list[str]]:
    return [
        [linear.name.removeprefix("model.layers.") for linear in unit.candidates[0].linears]
        for unit in choice.units
    ]


def candidates_of(choice: OpenChoice, name: str) -> list[str]:
    for unit in choice.units:
        if any(linear.name.endswith(name) for linear in unit.candidates[0].linears):
            return [candidate.scheme for candidate in unit.candidates]
    raise AssertionError(name)


@pytest.fixture(scope="module")
def picos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """64 wide, 96 in the middle: both divide by 32, and only the first by 64."""
    root = tmp_path_factory.mktemp("picos")
    return {
        family: open_checkpoint(
            resolve_source(
                str(
                    make_pico_model(
                        root / family, family=family, intermediate=96, vocab=64, tokenizer=False
                    )
                )
            )
        )
        for family in ("llama", "olmo2")
    }


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_fused_layers_are_one_unit(family: str, picos: dict[str, Checkpoint]) -> None:
    """By the family's data file, or by what shares an input."""
    choice = choice_of(make_recipe(), picos[family])

    assert unit_names(choice)[4:] == [
        ["1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"],
        ["1.self_attn.o_proj"],
        ["1.mlp.gate_proj", "1.mlp.up_proj"],
        ["1.mlp.down_proj"],
    ]
    assert [unit.block for unit in choice.units] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("schemes", [("w4a16",) * 8, ("none", "w8a16", "w4a16", "w8a16") * 2])
def test_predicted_bytes_are_those_of_the_plan_with_these_schemes(
    schemes: tuple[str, ...], picos: dict[str, Checkpoint]
) -> None:
    """So a choice within the bits makes an artifact within the bits."""
    recipe = make_recipe()
    choice = choice_of(recipe, picos["llama"])
    size = choice.fixed_bytes + sum(
        candidate.size_bytes
        for unit, scheme in zip(choice.units, schemes, strict=True)
        for candidate in unit.candidates
        if candidate.scheme == scheme
    )

    plan = plan_of(recipe, picos["llama"], allocation=allocate(choice, schemes))

    assert plan.artifact_bytes == size
    assert plan.choice is None
    assert plan.allocation == allocate(choice, schemes)


def allocate(choice: OpenChoice, schemes: tuple[str, ...]) -> Allocation:
    units = tuple(
        AllocatedUnit(tuple(linear.name for linear in unit.candidates[0].linears), (), scheme)
        for unit, scheme in zip(choice.units, schemes, strict=True)
    )
    return Allocation(units, 0, 9.0, None, 0.0, 0.0)


def test_the_range_reaches_from_the_smallest_to_the_largest_candidates(
    picos: dict[str, Checkpoint],
) -> None:
    """Its ends are the plans in which all layers have the same scheme."""
    choice = choice_of(make_recipe(), picos["llama"])
    ends = [
        plan_of(make_recipe(scheme=scheme, target_bits=None), picos["llama"]).bits_per_weight
        for scheme in ("w4a16", "none")
    ]

    assert [choice.lowest_bits, choice.highest_bits] == pytest.approx(ends)


def test_ignored_layers_and_schemes_by_override_are_not_open(picos: dict[str, Checkpoint]) -> None:
    """They are the user's; overrides without a scheme leave it open."""
    recipe = make_recipe(
        ignore=["lm_head", "*.0.mlp.*"],
        overrides=[
            {"match": "*.1.*.down_proj", "scheme": "w8a16"},
            {"match": "*.o_proj", "method": "rtn"},
        ],
    )
    plan = plan_of(recipe, picos["llama"])
    choice = plan.choice
    assert choice is not None
    assert unit_names(choice) == [
        ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        ["0.self_attn.o_proj"],
        ["1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"],
        ["1.self_attn.o_proj"],
        ["1.mlp.gate_proj", "1.mlp.up_proj"],
    ]

    settled = plan_of(recipe, picos["llama"], allocation=allocate(choice, ("w8a16",) * 5))
    linears = {
        linear.name.removeprefix("model.layers."): (linear.scheme.name, linear.method.name)
        for block in settled.blocks
        for group in block.groups
        for linear in group.linears
    }
    assert linears["0.mlp.down_proj"][0] == "none"
    assert linears["1.mlp.down_proj"][0] == "w8a16"
    assert linears["0.self_attn.o_proj"] == ("w8a16", "rtn")
    assert not any("has no effect" in note for note in settled.notes)


def test_candidates_that_do_not_fit_a_layer_are_left_out_with_a_note(
    picos: dict[str, Checkpoint],
) -> None:
    """A group size that does not divide; what else is there still can be had."""
    plan = plan_of(make_recipe(group_size=64), picos["llama"])
    choice = plan.choice
    assert choice is not None

    assert candidates_of(choice, "o_proj") == ["w4a16", "w8a16", "none"]
    assert candidates_of(choice, "down_proj") == ["none"]
    assert (
        "model.layers.*.mlp.down_proj (2 layers): not w4a16: "
        "group_size 64 does not divide in_features 96"
    ) in plan.notes


def test_a_layer_that_no_candidate_fits_is_a_problem(picos: dict[str, Checkpoint]) -> None:
    """One line, with the layers."""
    recipe = make_recipe(group_size=64, candidates=["w4a16", "w8a16"])

    assert problems_of(recipe, picos["llama"]) == (
        "model.layers.*.mlp.down_proj (2 layers): none of quantize.candidates fits",
    )


def test_layers_that_are_fused_with_a_given_one_can_only_be_like_it(
    picos: dict[str, Checkpoint],
) -> None:
    """A server could not load anything else."""
    overrides = [{"match": "*.q_proj", "scheme": "w8a16"}]
    choice = choice_of(make_recipe(overrides=overrides), picos["llama"])
    assert candidates_of(choice, "k_proj") == ["w8a16"]

    recipe = make_recipe(overrides=overrides, candidates=["w4a16", "none"])
    problems = problems_of(recipe, picos["llama"])
    assert (
        "model.layers.*.self_attn.k_proj, model.layers.*.self_attn.v_proj (4 layers): "
        "none of quantize.candidates fits"
    ) in problems


@pytest.mark.parametrize(
    ("quantize", "text"),
    [
        ({"target_bits": 4.0}, r"target_bits 4 cannot be reached: .* 5\.30 to 16\.00 bits"),
        ({"ignore": ["lm_head", "*"]}, "scheme auto has nothing to choose"),
        ({"overrides": [{"match": "*", "scheme": "w4a16"}]}, "scheme auto has nothing to choose"),
        ({"ignore": ["lm_head", "*.x"]}, r"ignore\[1\] '\*\.x' matches no layer"),
    ],
)
def test_what_cannot_be_chosen_is_said_before_any_work(
    quantize: dict[str, object], text: str, picos: dict[str, Checkpoint]
) -> None:
    """Clear and early."""
    with pytest.raises(PlanError, match=text):
        plan_of(make_recipe(**quantize), picos["llama"])


def test_the_lowest_target_that_a_problem_names_is_accepted(picos: dict[str, Checkpoint]) -> None:
    """It can be copied into the recipe."""
    (problem,) = problems_of(make_recipe(target_bits=4.0), picos["llama"])
    lowest = float(problem.partition("the artifact has ")[2].split()[0])

    assert choice_of(make_recipe(target_bits=lowest), picos["llama"]).target_bits == lowest


def test_a_target_above_all_is_noted(picos: dict[str, Checkpoint]) -> None:
    """It bounds nothing, and nothing is wrong with it."""
    plan = plan_of(make_recipe(target_bits=20.0), picos["llama"])

    assert any(note.startswith("target_bits 20 is no limit") for note in plan.notes)
    assert plan.bits_per_weight == pytest.approx(16.0)


def test_without_calibration_data_nothing_can_be_measured(picos: dict[str, Checkpoint]) -> None:
    """Even where no method of a candidate needs any."""
    assert any(
        "measures how sensitive layers are on calibration data" in problem
        for problem in problems_of(make_recipe(None, method="rtn"), picos["llama"])
    )


def test_what_is_wrong_with_any_candidate_is_found(picos: dict[str, Checkpoint]) -> None:
    """Not only with those that would be chosen: windows too long, methods that scale nothing."""
    long = {**CALIBRATION, "sequence_length": 4096}
    assert any("4096 is more than" in p for p in problems_of(make_recipe(long), picos["llama"]))
    recipe = make_recipe(method="awq")
    assert any("method awq scales inputs" in p for p in problems_of(recipe, picos["olmo2"]))


def test_an_open_plan_bounds_what_the_job_can_come_to(picos: dict[str, Checkpoint]) -> None:
    """Sizes by the target, memory by the hungriest candidate; and no note on what will not be."""
    open_plan = plan_of(make_recipe(), picos["llama"])
    w4 = plan_of(make_recipe(scheme="w4a16", target_bits=None), picos["llama"])

    assert open_plan.bits_per_weight == 9.0
    assert open_plan.artifact_bytes == 9 * open_plan.parameters // 8
    assert open_plan.disk_bytes > w4.disk_bytes
    assert open_plan.statistics_bytes == w4.statistics_bytes
    assert not any("nothing will be quantized" in note for note in open_plan.notes)
    assert not any("calibration data is not used" in note for note in open_plan.notes)


def test_half_of_the_calibration_windows_are_left_for_statistics(
    picos: dict[str, Checkpoint],
) -> None:
    """At most 4096 tokens are measured, in windows of at most 512."""

    def measured(samples: int, length: int) -> tuple[int, int]:
        calibration = {"data": "x.txt", "samples": samples, "sequence_length": length}
        found = choice_of(make_recipe(calibration), picos["llama"])
        return found.windows, found.window_tokens

    assert measured(8, 64) == (4, 64)
    assert measured(256, 512) == (8, 512)
    assert measured(256, 64) == (64, 64)
    assert measured(1, 64) == (1, 64)


def test_passes_cover_all_units_and_hold_what_fits(picos: dict[str, Checkpoint]) -> None:
    """Eight streams a block: two candidates of four units."""
    units = choice_of(make_recipe(), picos["llama"]).units
    more = (*units, *(replace(unit, block=unit.block + 3) for unit in units))

    assert list(_split_into_passes(more, 100)) == [(0, 5)]
    assert list(_split_into_passes(more, 16)) == [(0, 3), (3, 5)]
    assert list(_split_into_passes(more, 1)) == [(0, 1), (1, 3), (3, 4), (4, 5)]
    assert list(_split_into_passes((), 8)) == []
