"""report.json keeps to the schema that is published, and the schema to the records."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from quantkit.records import Report
from quantkit.report.document import render_json
from quantkit.report.schema import document_schema
from tests.report.hostile import make_hostile_comparison, make_hostile_report
from tests.report.measured import make_comparison, make_measured_report
from tests.report.sample import make_encoder_report, make_report
from tests.report.test_allocation import make_allocation

PUBLISHED = Path(__file__).parent.parent.parent / "docs" / "report.schema.json"

REPORTS = {
    "pass": make_report("PASS"),
    "unjudged": make_report("UNJUDGED"),
    "encoder": make_encoder_report(),
    "allocated": replace(make_report(), allocation=make_allocation()),
    "measured": make_measured_report("FAIL"),
    "comparison": make_comparison(),
    "hostile": make_hostile_report(),
    "hostile comparison": make_hostile_comparison(),
}


def close(schema: Any) -> Any:
    """Forbid every key that the schema does not name, where it names any."""
    if isinstance(schema, list):
        return [close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: close(each) for name, each in schema.items()}
    return {**closed, "additionalProperties": False} if "required" in schema else closed


def test_schema_is_the_published_one() -> None:
    """After a change: `python -m tests.report.test_schema` writes the file anew."""
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == document_schema()


def test_schema_is_a_schema() -> None:
    """By the rules of its own draft."""
    jsonschema.Draft202012Validator.check_schema(document_schema())


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_every_report_keeps_to_the_schema_and_has_no_other_key(report: Report) -> None:
    """Also where nothing was measured, and where texts are hostile."""
    validator = jsonschema.Draft202012Validator(close(document_schema()))

    assert [error.message for error in validator.iter_errors(json.loads(render_json(report)))] == []


def test_schema_finds_what_is_missing_or_of_another_kind() -> None:
    """A schema that everything keeps to would say nothing."""
    document = json.loads(render_json(make_measured_report()))
    validator = jsonschema.Draft202012Validator(document_schema())
    broken = [deepcopy(document) for _ in range(4)]
    del broken[0]["artifacts"][0]["probes"]
    broken[1]["artifacts"][0]["details"]["flips"]["low"] = "0.1"
    broken[2]["verdict"] = "GOOD"
    broken[3]["schema"] = 2

    assert all(len(list(validator.iter_errors(each))) == 1 for each in broken)


if __name__ == "__main__":
    PUBLISHED.write_text(json.dumps(document_schema(), indent=2) + "\n", encoding="utf-8")
