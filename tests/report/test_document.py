from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from quantkit.records import Metric
from quantkit.report.document import render_json, report_document
from tests.report.sample import make_report


def test_document_has_the_documented_shape() -> None:
    """Keys of the report, an artifact, its metrics and its checks are those that are promised."""
    document = report_document(make_report("PASS"))
    (artifact,) = document["artifacts"]

    assert document["schema"] == 1
    assert set(document) >= {"schema", "baseline", "artifacts", "verdict"}
    assert set(artifact) >= {
        "name",
        "path",
        "format",
        "scheme",
        "size_bytes",
        "bits_per_weight",
        "runtime",
        "metrics",
        "checks",
        "verdict",
        "reasons",
    }
    assert set(artifact["metrics"]["perplexity"]) == {
        "baseline",
        "value",
        "increase",
        "low",
        "high",
    }
    assert set(artifact["metrics"]["kl"]) == {"mean", "p99", "max", "low", "high"}
    assert set(artifact["metrics"]["top1_agreement"]) == {"value", "low", "high"}
    assert set(artifact["checks"][0]) == {
        "name",
        "limit",
        "value",
        "low",
        "high",
        "verdict",
        "custom",
    }


def test_numbers_are_the_records_unrounded() -> None:
    """What is read back from the text equals the records exactly."""
    report = make_report("FAIL")
    artifact = report.artifacts[0]
    judgement = artifact.judgement

    document = json.loads(render_json(report))

    (row,) = document["artifacts"]
    assert (document["verdict"], row["verdict"]) == ("FAIL", "FAIL")
    assert row["bits_per_weight"] == artifact.bits_per_weight
    assert row["metrics"]["kl"]["mean"] == judgement.kl.value  # type: ignore[union-attr]
    assert row["metrics"]["perplexity"]["increase"] == judgement.perplexity.increase  # type: ignore[union-attr]
    assert [check["value"] for check in row["checks"]] == [c.value for c in judgement.checks]
    assert document["layers"] == [asdict(layer) for layer in report.layers]
    assert tuple(row["reasons"]) == judgement.reasons
    assert document["baseline"]["size_bytes"] == report.baseline_bytes


def test_what_was_not_measured_is_null() -> None:
    """An unjudged artifact has the metrics' keys with null."""
    (artifact,) = report_document(make_report("UNJUDGED"))["artifacts"]

    assert artifact["metrics"] == {"perplexity": None, "kl": None, "top1_agreement": None}


def test_numbers_that_json_lacks_become_null() -> None:
    """NaN and infinities are null, and the text is strict JSON."""
    report = make_report("FAIL")
    judgement = replace(
        report.artifacts[0].judgement, kl=Metric(math.nan, -math.inf, math.inf, p99=0.5)
    )
    report = replace(report, artifacts=(replace(report.artifacts[0], judgement=judgement),))

    document = json.loads(render_json(report), parse_constant=pytest.fail)

    assert document["artifacts"][0]["metrics"]["kl"] == {
        "mean": None,
        "p99": 0.5,
        "max": None,
        "low": None,
        "high": None,
    }


def test_evidence_with_paths_and_tuples_becomes_plain_data() -> None:
    """Paths are text and tuples are lists; what has no form in JSON is an error."""
    report = replace(make_report(), evidence={"files": (Path("a/b"),), "none": None})
    assert report_document(report)["evidence"] == {"files": ["a/b"], "none": None}

    with pytest.raises(TypeError, match="cannot hold a object"):
        report_document(replace(report, evidence={"x": object()}))
