"""report.json is read back into the records that it was written from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quantkit.records import Report
from quantkit.report import report_document
from quantkit.report.reading import read_report
from quantkit.report.write import render_reports
from tests.report.hostile import make_hostile_report
from tests.report.measured import make_comparison, make_measured_report
from tests.report.sample import make_encoder_report, make_report

REPORTS = {
    "passed": make_report(),
    "failed": make_report("FAIL"),
    "unjudged": make_report("UNJUDGED"),
    "measured": make_measured_report(),
    "encoder": make_encoder_report(),
    "hostile": make_hostile_report(),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_renders_the_same_from_its_own_document(name: str) -> None:
    """In every form, to the letter: nothing is lost on the way, but which note is whose."""
    report: Report = REPORTS[name]
    document = json.loads(json.dumps(report_document(report)))
    assert render_reports(read_report(document)) == render_reports(report)


def test_a_comparison_is_not_the_report_of_a_job() -> None:
    """Its artifacts compete, and its verdict is the best of theirs."""
    with pytest.raises(ValueError, match="compares"):
        read_report(report_document(make_comparison()))


def test_what_is_no_report_is_an_error_and_no_half_of_one() -> None:
    """Each of the errors that the docstring names."""
    document = report_document(replace(make_report(), notes=()))
    for broken in ({}, document | {"artifacts": 7}, document | {"layers": [{}]}, {"comparison": 0}):
        with pytest.raises(ValueError, match="it is no report"):
            read_report(broken)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("verdict",), ["PASS"]),
        (("notes",), [7]),
        (("baseline", "size_bytes"), 10**30),
        (("artifacts", 0, "bits_per_weight"), "4"),
        (("artifacts", 0, "checks", 0, "limit"), True),
        (("artifacts", 0, "windows"), 1.5),
        (("layers", 0, "relative_error"), {}),
    ],
)
def test_a_value_of_another_type_is_named(place: tuple[str | int, ...], value: object) -> None:
    """Whoever reads on would fall over it."""
    document = json.loads(json.dumps(report_document(replace(make_report(), notes=()))))
    node = document
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value

    with pytest.raises(ValueError, match=r"^Report\."):
        read_report(document)
