from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from quantkit.records import Verdict
from quantkit.report.junit import render_junit
from tests.report.hostile import make_hostile_report
from tests.report.sample import make_report


def test_every_check_is_a_case_and_the_verdict_is_one_more() -> None:
    """Names of the cases are those of the checks, so that a CI can follow them over time."""
    root = ET.fromstring(render_junit(make_report("PASS", artifacts=2)))
    names = [[case.get("name") for case in suite] for suite in root]

    assert names == [["max_perplexity_increase", "max_kl", "min_top1_agreement", "verdict"]] * 2
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("8", "0", "0")


@pytest.mark.parametrize(
    ("verdict", "failing", "kinds"),
    [("PASS", 0, set()), ("FAIL", 4, {"FAIL"}), ("INCONCLUSIVE", 2, {"INCONCLUSIVE"})],
)
def test_what_is_not_proven_is_a_failure(verdict: Verdict, failing: int, kinds: set[str]) -> None:
    """FAIL and INCONCLUSIVE are failures that differ in their type."""
    root = ET.fromstring(render_junit(make_report(verdict)))
    failures = list(root.iter("failure"))

    assert len(failures) == failing
    assert {failure.get("type") for failure in failures} == kinds
    assert root.get("failures") == str(failing)


def test_unjudged_is_skipped() -> None:
    """An artifact that nobody judged is neither green nor red."""
    root = ET.fromstring(render_junit(make_report("UNJUDGED")))

    assert len(list(root.iter("skipped"))) == 1
    assert root.get("failures") == "0"


def test_suspicion_without_a_failed_check_fails_the_run() -> None:
    """The case `verdict` carries the reasons that belong to no check."""
    report = make_report("PASS")
    judgement = replace(report.artifacts[0].judgement, verdict="FAIL", reasons=("it loops", "bos"))
    artifact = replace(report.artifacts[0], judgement=judgement)

    root = ET.fromstring(render_junit(replace(report, verdict="FAIL", artifacts=(artifact,))))
    (failure,) = root.iter("failure")

    assert failure.get("message") == "it loops"
    assert failure.text == "it loops\nbos"


def test_report_without_artifacts_is_one_skipped_case() -> None:
    """A CI that finds no test at all would call the run green."""
    report = replace(make_report("UNJUDGED"), artifacts=())

    root = ET.fromstring(render_junit(report))

    assert len(list(root.iter("skipped"))) == root.get("tests", "").count("1") == 1


def test_hostile_text_leaves_valid_xml() -> None:
    """Control characters, lone surrogates and markup do not break the file."""
    text = render_junit(make_hostile_report())

    root = ET.fromstring(text.encode())
    assert len(list(root.iter("failure"))) == 4
    assert "<script>alert(1)</script>" in str(root[0].get("name"))
