from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import yaml

from quantkit.judging.needing import estimate_windows
from quantkit.judging.percentile import texts_for_percentile
from quantkit.judging.sampling import explain_windows
from quantkit.records import Check, LayerRecord, Report, Verdict
from quantkit.report.advice import suggestions, verdict_sentence
from quantkit.report.layers import locate, short_kinds, worst_layers
from tests.report.measured import make_measured_report
from tests.report.sample import make_check, make_judgement, make_layers, make_report


def is_command(setting: str) -> bool:
    """Whether it is for the shell and not for the recipe."""
    return setting.startswith("quantkit ")


def settings(report: Report) -> list[Any]:
    """What the advice says to put into the recipe, read as YAML."""
    found = [suggestion.setting for suggestion in suggestions(report)]
    return [yaml.safe_load(setting) for setting in found if not is_command(setting)]


def with_layers(report: Report, **changes: Any) -> Report:
    return replace(report, layers=tuple(replace(layer, **changes) for layer in report.layers))


def with_checks(report: Report, verdict: Verdict, *checks: Check, windows: int = 128) -> Report:
    judgement = replace(
        report.artifacts[0].judgement, verdict=verdict, checks=checks, windows=windows
    )
    artifact = replace(report.artifacts[0], judgement=judgement)
    return replace(report, verdict=verdict, artifacts=(artifact,))


def test_pass_needs_no_advice() -> None:
    """Nothing is suggested for an artifact that passed."""
    assert suggestions(make_report("PASS")) == ()


def test_failure_names_the_three_worst_layers_and_gives_them_eight_bits() -> None:
    """The overrides are those of the largest errors, with the layers that vLLM fuses."""
    report = make_report("FAIL", blocks=32)
    worst = sorted(report.layers, key=lambda layer: -(layer.relative_error or 0))[:3]
    *_, last, _ = suggestions(report)
    matches = [row["match"] for row in yaml.safe_load(last.setting)["quantize"]["overrides"]]

    assert all(layer.name in last.why and layer.name in matches for layer in worst)
    assert len(matches) == len(set(matches))
    for match in matches:
        if match.endswith("gate_proj"):
            assert match.replace("gate_proj", "up_proj") in matches


def test_failure_of_a_weaker_recipe_suggests_method_and_smaller_groups_first() -> None:
    """Settings that cost least come first; those already in use are not suggested."""
    weak = with_layers(make_report("FAIL"), method="rtn")
    assert settings(weak)[:2] == [
        {"quantize": {"method": "awq+gptq"}},
        {"quantize": {"group_size": 64}},
    ]

    strong = with_layers(make_report("FAIL"), group_size=32)
    assert [list(found["quantize"]) for found in settings(strong)] == [["overrides"]]

    channel = with_layers(make_report("FAIL"), group_size=None)
    assert settings(channel)[0] == {"quantize": {"group_size": 128}}


def test_eight_bit_artifact_is_not_told_to_use_eight_bits() -> None:
    """Where every layer has 8 bits already, the recipe has nothing more to give."""
    report = with_layers(make_report("FAIL"), scheme="w8a16", bits_per_weight=8.125)

    assert settings(report) == []


def test_failure_without_a_broken_limit_gets_no_accuracy_advice() -> None:
    """A worker that died or a NaN is mended by no setting of the recipe."""
    report = with_checks(make_report("FAIL"), "FAIL")

    assert suggestions(report) == ()
    assert verdict_sentence(report).startswith("It failed without a broken limit.")


def test_a_failed_artifact_of_somebody_else_is_left_to_bisect() -> None:
    """A gate knows no layers to name; its paths are those that it was given."""
    report = replace(make_report("FAIL"), layers=(), evidence={}, model="my model")
    artifact = replace(report.artifacts[0], path="/their artifact")

    (found,) = suggestions(replace(report, artifacts=(artifact,)))

    assert found.setting == "quantkit bisect '/their artifact' --baseline 'my model'"
    graph = replace(artifact, format="onnx")
    assert suggestions(replace(report, artifacts=(graph,))) == ()


def test_inconclusive_asks_for_as_many_windows_as_the_interval_needs() -> None:
    """An interval twice too wide needs four times the windows, and a little more."""
    check = make_check("max_kl", 0.05, 0.04, 0.02)
    assert check.verdict == "INCONCLUSIVE"

    (found,) = settings(with_checks(make_report("PASS"), "INCONCLUSIVE", check))

    assert 4 * 128 <= found["gate"]["samples"] <= 5 * 128


def test_the_advice_names_the_number_that_the_reason_names() -> None:
    """One estimate; for both keys, so that it fits a recipe that has either of them."""
    check = make_check("max_kl", 0.05, 0.043, 0.016)
    needed = estimate_windows([check], 32)
    assert needed is not None
    reason = explain_windows(needed, 32, available=32, limit=32)
    report = with_checks(make_report("PASS"), "INCONCLUSIVE", check, windows=32)

    (found,) = settings(report)

    assert found == {"gate": {"samples": needed, "max_samples": needed}}
    assert f"at least {needed - 32} more" in reason
    assert f"({needed} in all)" in reason
    encoder = replace(report.artifacts[0], task="embedding")
    assert settings(replace(report, artifacts=(encoder,))) == [{"gate": {"samples": needed}}]


def test_a_percentile_without_a_bound_is_given_the_texts_that_bound_it() -> None:
    """As the reason says it: no spread tells how many."""
    check = Check("min_cosine_p1", 0.9, 0.98, -1.0, 0.99, "INCONCLUSIVE")
    report = with_checks(make_report("PASS"), "INCONCLUSIVE", check, windows=100)
    artifact = replace(report.artifacts[0], task="embedding")

    (found,) = settings(replace(report, artifacts=(artifact,)))

    confidence = artifact.judgement.confidence
    assert found == {"gate": {"samples": texts_for_percentile(confidence)}}


def test_value_on_its_limit_is_not_sent_for_more_windows() -> None:
    """Where millions of windows would be needed, the advice says so instead."""
    check = make_check("max_kl", 0.05, 0.05, 0.02)

    (found,) = suggestions(with_checks(make_report("PASS"), "INCONCLUSIVE", check))

    assert found.setting == ""
    assert "hardly decide" in found.why


def test_failure_is_not_sent_for_more_windows() -> None:
    """They decide nothing where a limit is broken already."""
    broken = make_check("max_kl", 0.05, 0.09, 0.01)
    open_question = make_check("min_top1_agreement", 0.9, 0.9, 0.01)
    report = with_checks(make_report("FAIL"), "FAIL", broken, open_question)

    assert all("gate" not in setting for setting in settings(report))


def test_too_few_windows_are_not_called_a_straddling_interval() -> None:
    """An interval within the limit that does not count says that too little was measured."""
    check = Check("max_kl", 0.05, 0.01, 0.009, 0.011, "INCONCLUSIVE")
    report = with_checks(make_report("PASS"), "INCONCLUSIVE", check, windows=4)

    assert verdict_sentence(report).endswith("too little was measured.")
    (found,) = settings(report)
    assert found["gate"]["samples"] > 4


def test_unjudged_report_gives_the_command_that_judges() -> None:
    """Names are quoted for the shell."""
    report = replace(make_report("UNJUDGED"), model="my model; rm -rf x")

    (found,) = suggestions(report)

    assert found.setting == (
        "quantkit gate OUTPUT/compressed-tensors --baseline 'my model; rm -rf x'"
    )


def test_hostile_layer_names_stay_one_pattern_of_the_recipe() -> None:
    """A suggested override is valid YAML whatever the layer is called."""
    name = 'model.layers.0.x"}\n- {match: "*'
    layer = replace(make_layers(1)[0], name=name)
    report = replace(make_report("FAIL"), layers=(layer,))

    overrides = settings(report)[-1]["quantize"]["overrides"]

    assert overrides == [{"match": name, "scheme": "w8a16"}]


def test_worst_layers_put_a_nan_first_and_do_not_mix_kinds_of_error() -> None:
    """An error that is no number is the worst; weight errors do not compete with output errors."""

    def layer(name: str, output: float | None, weight: float) -> LayerRecord:
        return replace(make_layers(1)[0], name=name, relative_error=output, weight_error=weight)

    layers = [
        layer("a", 0.1, 0.5),
        layer("b", math.nan, 0.1),
        layer("c", None, 0.9),
        layer("d", 0.2, 0),
    ]

    assert [found.name for found in worst_layers(layers)] == ["b", "d", "a"]
    assert [found.name for found in worst_layers(layers[2:3])] == ["c"]


def test_a_failed_task_is_a_matter_of_accuracy_too() -> None:
    """The layers' bits mend it as they do a failed check."""
    report = replace(make_measured_report("FAIL"), layers=make_report("FAIL").layers)
    (artifact,) = report.artifacts
    judgement = replace(artifact.judgement, checks=make_judgement("PASS").checks)
    report = replace(report, artifacts=(replace(artifact, judgement=judgement),))
    assert suggestions(report)
    judgement = replace(judgement, tasks=())
    assert not suggestions(replace(report, artifacts=(replace(artifact, judgement=judgement),)))


def test_layer_names_are_taken_apart() -> None:
    """Block, kind and experts are read from the name."""
    assert locate("model.layers.3.mlp.down_proj") == (3, "mlp.down_proj")
    assert locate("transformer.h.11.attn.c_attn") == (11, "attn.c_attn")
    assert locate("model.layers.0.mlp.experts.17.up_proj") == (0, "mlp.experts.*.up_proj")
    assert locate("lm_head") == (None, "lm_head")
    assert short_kinds(["attn.out", "mlp.out", "mlp.up"]) == {
        "attn.out": "attn.out",
        "mlp.out": "mlp.out",
        "mlp.up": "up",
    }
