"""What every form of a report shows of an encoder, and of speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from quantkit.cli.reports import gate_reply, quantize_reply
from quantkit.records import Artifact, Judgement, Measure, Metric, Report, Result, Speed, Verdict
from quantkit.report.advice import suggestions, verdict_sentence
from quantkit.report.closeness import common_distance
from quantkit.report.document import render_json, report_document
from quantkit.report.html import render_html
from quantkit.report.junit import render_junit
from quantkit.report.markdown import render_markdown
from quantkit.report.model_card import render_model_card
from quantkit.report.pareto import pareto_plot
from quantkit.report.rows import headline_cells, headline_rows, speed_rows
from tests.report.hostile import HOSTILE
from tests.report.sample import (
    make_check,
    make_encoder_artifact,
    make_encoder_judgement,
    make_encoder_report,
    make_report,
)

VERDICTS: tuple[Verdict, ...] = ("PASS", "FAIL", "INCONCLUSIVE", "UNJUDGED")
TOKENS = (
    Speed("tokens", "decoding of 32 tokens after 256", 310.0, 905.2, "onnxruntime 1.32.0", 2, 5),
    Speed("tokens", "prefill of 1 x 256 tokens", 2011.0, 1802.0, "onnxruntime 1.32.0", 1),
)


def with_judgement(report: Report, judgement: Judgement) -> Report:
    artifact = replace(report.artifacts[0], judgement=judgement)
    return replace(report, artifacts=(artifact,), verdict=judgement.verdict)


def said(lines: list[Any]) -> str:
    """What a terminal of any width shows."""
    from quantkit.cli.console import render_plain

    return render_plain(lines)


def test_the_headline_of_an_encoder_has_its_measures_and_no_perplexity() -> None:
    (cells,) = headline_cells(headline_rows(make_encoder_report()))

    assert list(cells) == [
        "Artifact",
        "Format",
        "Scheme",
        "Size",
        "Bits/weight",
        "Cosine",
        "Cosine, 1st percentile",
        "Retrieval overlap",
        "Spearman correlation",
        "Speed",
        "Verdict",
    ]
    assert cells["Cosine"] == "0.9942 (0.9939 to 0.9945)"
    assert cells["Retrieval overlap"] == "94.1% (93.4% to 94.8%)"
    assert cells["Spearman correlation"] == "0.8324 → 0.8311 (0.8290 to 0.8332)"
    assert cells["Speed"] == "64.9 → 119 sentences/s (1.84×)"


def test_an_encoder_that_was_not_measured_has_no_columns_of_a_decoder() -> None:
    """The task alone says what it is."""
    (cells,) = headline_cells(headline_rows(make_encoder_report("UNJUDGED")))

    assert "Perplexity" not in cells


def test_a_percentile_without_a_lower_bound_shows_none() -> None:
    judgement = make_encoder_judgement("PASS")
    measure = Measure("cosine_p1", Metric(0.9996, -1.0, 0.9997))

    report = with_judgement(make_encoder_report(), replace(judgement, measures=(measure,)))

    (cells,) = headline_cells(headline_rows(report))
    assert cells["Cosine, 1st percentile"] == "0.99960 (at most 0.99970)"


def test_rows_of_a_mixed_table_have_the_same_columns() -> None:
    """What one artifact does not have is a dash."""
    mixed = replace(
        make_report(),
        artifacts=(*make_report().artifacts, make_encoder_artifact()),
        comparison=True,
    )

    first, second = headline_cells(headline_rows(mixed))

    assert list(first) == list(second)
    assert (first["Cosine"], second["Perplexity"], first["Speed"]) == ("–", "–", "–")
    for text in (render_html(mixed), render_markdown(mixed), render_junit(mixed)):
        assert "encoder-int8" in text


def test_timings_of_a_decoder_are_columns_of_their_own() -> None:
    report = make_report()
    report = with_judgement(report, replace(report.artifacts[0].judgement, speed=TOKENS))

    (cells,) = headline_cells(headline_rows(report))
    rows = speed_rows(report)

    assert cells["Speed, decoding"] == "310 → 905 tokens/s (2.92×)"
    assert cells["Speed, prefill"] == "2011 → 1802 tokens/s (0.896×)"
    assert [row.where for row in rows] == [
        "onnxruntime 1.32.0, 2 threads, median of 5",
        "onnxruntime 1.32.0, 1 thread",
    ]


def test_every_form_has_measures_and_speed() -> None:
    report = make_encoder_report()
    card = render_model_card(report, report.artifacts[0])

    for text in (render_html(report), render_markdown(report), card):
        for figure in ("0.9942", "0.9939 to 0.9945", "0.8324 → 0.8311", "64.9 → 119 sentences/s"):
            assert figure in text
        assert "1000 texts" in text
        assert "onnxruntime 1.32.0, 2 threads, median of 5" in text
        assert "16-bit" not in text
        assert "Perplexity" not in text


def test_json_has_them_unrounded_beside_the_keys_that_it_had() -> None:
    report = make_encoder_report()

    (row,) = report_document(report)["artifacts"]

    assert row["metrics"] == {"perplexity": None, "kl": None, "top1_agreement": None}
    assert row["task"] == "embedding"
    assert row["measures"][3] == {
        "name": "spearman",
        "baseline": 0.8324,
        "value": 0.8311,
        "low": 0.829,
        "high": 0.8332,
    }
    assert row["speed"][0]["artifact"] == 119.39
    assert json.loads(render_json(report))["schema"] == 1
    (decoder,) = report_document(make_report())["artifacts"]
    assert (decoder["task"], decoder["measures"], decoder["speed"]) == (None, [], [])


def test_junit_has_them_as_properties() -> None:
    """Their names can be followed over time; reports without any are as they were."""
    root = ET.fromstring(render_junit(make_encoder_report()))

    found = {each.get("name"): each.get("value") for each in root.iter("property")}

    assert found["cosine"] == "0.9942"
    assert found["sentences per second, 128 texts of 26 tokens on average"] == "119.39"
    assert [case.get("name") for case in root.iter("testcase")][:2] == [
        "min_cosine",
        "min_retrieval_overlap",
    ]
    assert "properties" not in render_junit(make_report())


def test_the_terminal_shows_the_measures_and_one_line_of_speed(tmp_path: Path) -> None:
    reply = gate_reply(make_encoder_report(), tmp_path)

    text = said(list(reply.lines))

    assert "Cosine, 1st percentile" in text
    assert (
        "speed    128 texts of 26 tokens on average: 64.9 → 119 sentences/s (1.84×); "
        "onnxruntime 1.32.0, 2 threads, median of 5" in text
    )


@pytest.mark.parametrize("verdict", VERDICTS)
def test_pages_of_encoders_are_whole(verdict: Verdict) -> None:
    from tests.report.test_html import read

    report = make_encoder_report(verdict)

    assert verdict in read(report).texts["span"]
    assert render_markdown(report).splitlines()[0].startswith("## ")


def test_hostile_text_in_measures_and_speed_is_escaped() -> None:
    judgement = make_encoder_judgement("PASS")
    speed = replace(judgement.speed[0], what=HOSTILE, runtime=HOSTILE)
    hostile = replace(
        judgement, measures=(Measure(HOSTILE, Metric(0.5, 0.4, 0.6)),), speed=(speed, speed)
    )
    report = with_judgement(make_encoder_report(), hostile)

    assert "<script>alert" not in render_html(report)
    assert "<script>" not in render_markdown(report)
    ET.fromstring(render_junit(report))
    json.loads(render_json(report))


def test_the_picture_of_encoders_shows_how_far_their_cosine_is_from_one() -> None:
    """And of a mixed comparison what most of its artifacts have."""
    artifacts = (
        make_encoder_artifact(),
        make_encoder_artifact("INCONCLUSIVE", name="smaller", size=20_000_000),
    )
    report = replace(make_encoder_report(), artifacts=artifacts, comparison=True)

    plot = pareto_plot(report)

    assert plot is not None
    assert plot.y_label == "1 − mean cosine"
    assert plot.points[0].y > plot.points[1].y
    assert plot.points[0].title == "encoder-int8: 22.9 MB, 1 − cosine 0.00580"
    assert common_distance((*make_report(artifacts=3).artifacts, *artifacts)) == "kl"


def test_a_comparison_of_encoders_says_which_is_the_closest() -> None:
    near = make_encoder_artifact(name="near", size=30_000_000)
    worse = replace(near.judgement, measures=(Measure("cosine", Metric(0.992, 0.991, 0.993)),))
    small = replace(make_encoder_artifact(name="small", size=20_000_000), judgement=worse)
    report = replace(make_encoder_report(), artifacts=(near, small), comparison=True)

    assert (
        "small is the smallest (20.0 MB, 1 − cosine 0.00800), near the closest"
        in verdict_sentence(report)
    )
    # A decoder has no cosine, and no distance in common with them.
    mixed = replace(report, artifacts=(near, small, *make_report().artifacts))
    assert verdict_sentence(mixed).endswith("which is the closest is not known.")


def test_advice_on_a_failed_encoder_fits_the_recipe_of_one() -> None:
    """Layers in float, not groups of 4-bit weights; two layers are in float already."""
    layers = [
        replace(layer, scheme="w8a8_static", method="rtn", bits_per_weight=8.1)
        for layer in make_report().layers
    ]
    evidence = {"encoder": {"float_layers": ["first", "second"]}}
    failed = replace(make_encoder_report("FAIL"), evidence=evidence)

    found = suggestions(replace(failed, layers=tuple(layers)))

    assert [yaml.safe_load(each.setting) for each in found] == [
        {"quantize": {"method": "smoothquant+gptq"}},
        {"quantize": {"scheme": "w8a8"}},
        {"export": [{"format": "onnx", "float_layers": 5}]},
    ]
    assert suggestions(make_encoder_report("FAIL")) == ()
    best = [
        replace(layer, scheme="w8a8", method="smoothquant+gptq, bias corrected") for layer in layers
    ]
    (last,) = suggestions(replace(make_encoder_report("FAIL"), layers=tuple(best)))
    assert "float_layers: 3" in last.setting


def test_advice_on_an_undecided_percentile_is_as_many_texts_as_it_needs() -> None:
    check = replace(
        make_check("min_cosine_p1", 0.97, 0.98, 0.001), low=-1.0, verdict="INCONCLUSIVE"
    )
    judgement = replace(
        make_encoder_judgement("INCONCLUSIVE"), checks=(check,), windows=128, reasons=()
    )

    (found,) = suggestions(with_judgement(make_encoder_report(), judgement))

    assert yaml.safe_load(found.setting)["gate"]["samples"] >= 368
    assert "texts" in found.why


@pytest.mark.parametrize(
    ("task", "tag"),
    [
        ("embedding", "feature-extraction"),
        ("sequence-classification", "text-classification"),
        ("token-classification", "token-classification"),
    ],
)
def test_the_card_of_an_encoder_says_what_it_is_for_and_how_to_run_it(task: str, tag: str) -> None:
    report = replace(make_encoder_report(model="org/encoder@0123abc"))
    artifact = replace(report.artifacts[0], task=task)

    _, front, body = render_model_card(report, artifact).split("---\n", 2)

    keys = yaml.safe_load(front)
    assert (keys["library_name"], keys["pipeline_tag"]) == ("onnx", tag)
    assert keys["tags"] == ["quantkit", "onnx", "w8a8"]
    assert "onnxruntime.InferenceSession" in body
    assert "vllm" not in body


def test_the_card_of_a_decoder_in_onnx_runs_it_with_genai() -> None:
    report = make_report()
    artifact = replace(report.artifacts[0], format="onnx")

    _, front, body = render_model_card(report, artifact).split("---\n", 2)

    assert yaml.safe_load(front)["library_name"] == "onnxruntime-genai"
    assert "onnxruntime_genai" in body


@pytest.mark.parametrize(
    ("files", "package"),
    [({"genai_config.json": ""}, "onnxruntime_genai"), ({}, "onnxruntime")],
)
def test_the_last_line_of_a_job_runs_the_artifact(
    tmp_path: Path, files: dict[str, str], package: str
) -> None:
    artifact = Artifact("x", "onnx", tmp_path / "a b", files, 1, 8.0)
    report = make_encoder_report()
    result = Result(tmp_path, "PASS", None, (artifact,), report)  # type: ignore[arg-type]

    reply = quantize_reply(result)

    assert reply.document["serve"].startswith(f"python -c 'import {package} as ")
    assert f"{tmp_path.as_posix()}/a b" in reply.document["serve"]
