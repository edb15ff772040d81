from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.records import Report, Verdict
from quantkit.report.model_card import (
    read_carried_front_matter,
    render_model_card,
    write_model_card,
)
from tests.report.hostile import HOSTILE, make_hostile_report
from tests.report.sample import RECIPE, make_report


def split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body, as a reader of model cards splits them."""
    opening, front, body = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front), body


def render(report: Report, **carried: Any) -> tuple[dict[str, Any], str]:
    return split(render_model_card(report, report.artifacts[0], carried=carried))


def hub_report(verdict: Verdict = "PASS", model: str = "org/model") -> Report:
    return replace(make_report(verdict, model=model), evidence={"recipe": RECIPE})


@pytest.mark.parametrize("model", ["org/model", "org/model@0123abc"])
def test_front_matter_names_base_model_library_and_tags(model: str) -> None:
    """The Hub links the artifact to its original, without the revision."""
    front, _ = render(hub_report(model=model), license="apache-2.0")

    assert front == {
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantkit", "compressed-tensors", "w4a16"],
        "license": "apache-2.0",
    }


def test_tags_are_the_schemes_of_the_layers_once_each() -> None:
    """Words to search for, whatever sentence the artifact's scheme is described by."""
    report = hub_report()
    first, *rest = report.layers
    layers = (replace(first, scheme="w8a16"), *rest)
    artifact = replace(report.artifacts[0], scheme="w4a16 g128 awq+gptq, w8a16 g128 rtn")

    front, body = render(replace(report, layers=layers, artifacts=(artifact,)))

    assert front["tags"] == ["quantkit", "compressed-tensors", "w8a16", "w4a16"]
    assert "quantized to w4a16 g128 awq+gptq, w8a16 g128 rtn" in body


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE", "UNJUDGED"])
def test_verdict_stands_above_everything_else(verdict: Verdict) -> None:
    """The first line after the title says the verdict."""
    _, body = render(hub_report(verdict))
    lines = [line for line in body.splitlines() if line]

    assert lines[0].startswith("# ")
    assert lines[1].startswith(f"> **{verdict}**")


def test_failed_artifact_says_do_not_use_and_why() -> None:
    """A FAIL is not softened."""
    report = hub_report("FAIL")
    _, body = render(report)

    assert "Do not use this artifact" in body
    assert body.count("against a limit of") == len(report.artifacts[0].judgement.reasons)


def test_card_has_figures_recipe_and_commands() -> None:
    """Measured values, the recipe verbatim, and how to serve and load."""
    _, body = render(hub_report())

    for text in ("4.11 MB (3.06× smaller)", "0.0123 (0.0118 to 0.0128)", "at most 3.00%", RECIPE):
        assert text in body
    assert "vllm serve ." in body
    assert 'AutoModelForCausalLM.from_pretrained(".", dtype="auto")' in body


def test_location_is_quoted_in_commands() -> None:
    """A location with spaces works in the shell and in Python."""
    report = hub_report()
    card = render_model_card(report, report.artifacts[0], location="a b'c")

    assert "vllm serve 'a b'\"'\"'c'" in card
    assert 'from_pretrained("a b\'c")' in card


@pytest.mark.parametrize("model", ["/home/somebody/private/demo", "./x/demo/", "C:\\x\\demo"])
def test_folder_is_named_by_its_last_part_and_is_no_base_model(model: str) -> None:
    """Where the original lay on somebody's disk does not go into a public card."""
    report = hub_report(model=model)
    front, body = render(report)

    assert "base_model" not in front
    assert "# demo, quantized to w4a16" in body.replace("\\_", "_")
    assert "somebody" not in body


def test_folder_that_looks_like_a_hub_id_is_told_by_the_evidence() -> None:
    """`models/demo-llama` without a revision is a folder, not somebody's repository."""
    front, body = render(make_report(model="models/demo-llama"))

    assert "base_model" not in front
    assert "`demo-llama`" in body


def test_hostile_names_do_not_break_out_of_the_front_matter() -> None:
    """A name with newlines, `---` and keys stays one value."""
    front, body = render(make_hostile_report(), license=HOSTILE, base_model="evil", tags=["evil"])

    assert set(front) <= {"library_name", "pipeline_tag", "tags", "license"}
    assert front["tags"][0] == "quantkit"
    assert "<script>" not in body.replace(HOSTILE.split("\n")[0], "").split("```")[0]
    assert "\n---\n" not in body.split("`````")[0]


def test_card_is_the_same_for_the_same_job() -> None:
    """Timings and paths of the run are not in it."""
    report = make_report()
    later = replace(report, evidence={**report.evidence, "timings": {"seconds": {"gate": 1.0}}})

    first = render_model_card(report, report.artifacts[0])
    assert first == render_model_card(later, later.artifacts[0])


@pytest.mark.parametrize(
    ("readme", "carried"),
    [
        (
            "---\nlicense: other\nlicense_name: x\ntags: [a]\n---\n# T",
            {"license": "other", "license_name": "x"},
        ),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense: {a: b}\n---\n", {}),
        ("---\nlicense: &a mit\nx: *a\n---\n", {}),
        ("---\n: : [\n---\n", {}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("", {}),
    ],
)
def test_licence_is_carried_over_from_the_original(
    tmp_path: Path, readme: str, carried: dict[str, Any]
) -> None:
    """Only the licence and the language are taken, and only as text; the rest is ignored."""
    (tmp_path / "README.md").write_text(readme)

    assert read_carried_front_matter(tmp_path / "README.md") == carried


def test_original_without_a_card_is_no_problem(tmp_path: Path) -> None:
    """No README.md, or a folder in its place, carries nothing."""
    assert read_carried_front_matter(tmp_path / "README.md") == {}
    assert read_carried_front_matter(tmp_path) == {}


def test_card_is_written_into_the_artifact(tmp_path: Path) -> None:
    """README.md lies beside the weights, with the original's licence, and nothing else is left."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    report = hub_report()

    path = write_model_card(report, report.artifacts[0], target, source)

    front, _ = split(path.read_text())
    assert front["license"] == "mit"
    assert [entry.name for entry in target.iterdir()] == ["README.md"]
