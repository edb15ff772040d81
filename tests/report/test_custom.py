"""Tests of quantkit.report.custom: the user's own checks in every form of the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from quantkit.cli.console import render_plain
from quantkit.cli.reports import gate_reply
from quantkit.records import CustomCheck, Report
from quantkit.report.advice import verdict_sentence
from quantkit.report.custom import custom_rows, custom_sentence
from quantkit.report.document import render_json
from quantkit.report.html import render_html
from quantkit.report.junit import render_junit
from quantkit.report.markdown import render_markdown
from quantkit.report.model_card import render_model_card
from quantkit.report.reading import read_report
from quantkit.report.schema import document_schema
from tests.report.sample import make_report
from tests.report.test_schema import close

EVIL = "<b>|@me` \x1b[31m"

PASSED = CustomCheck("keeps_json", 0.91, 0.9, "PASS", "31 of 34 prompts", "mine.json", "a" * 64)
FAILED = CustomCheck(f"evil {EVIL}", None, None, "FAIL", f"said {EVIL}", "mine.`x|y`", None)


def with_checks(*checks: CustomCheck) -> Report:
    verdict = "FAIL" if any(check.verdict == "FAIL" for check in checks) else "PASS"
    report = make_report(verdict)
    (first, *others) = report.artifacts
    judged = replace(first.judgement, custom_checks=checks)
    return replace(report, artifacts=(replace(first, judgement=judged), *others))


def test_a_row_has_as_many_digits_as_tell_value_and_limit_apart() -> None:
    """A check without numbers has dashes, and only words in its sentence."""
    close_by = replace(PASSED, value=0.90004)
    report = with_checks(PASSED, close_by, FAILED)
    rows = custom_rows(report.artifacts[0])

    assert [(row.value, row.limit) for row in rows[:2]] == [
        ("0.910", "0.900"),
        ("0.90004", "0.90000"),
    ]
    assert (rows[2].value, rows[2].limit) == ("–", "–")
    assert rows[0].code == f"mine.json {'a' * 12}"
    assert custom_sentence(rows[0]) == "keeps_json 0.910, limit 0.900: 31 of 34 prompts"
    assert custom_sentence(rows[2]).startswith("evil <b>")


def test_a_page_a_comment_and_a_card_show_them_and_escape_them() -> None:
    """They come from the user's functions, which may show a model's words."""
    report = with_checks(PASSED, FAILED)
    html, markdown = render_html(report), render_markdown(report)
    card = render_model_card(report, report.artifacts[0])

    assert 'id="custom-checks"' in html
    assert "<b>|" not in html
    for text in (html, markdown, card):
        assert "keeps" in text
        assert "31 of 34 prompts" in text
        assert "\x1b" not in text
    for text in (markdown, card):
        assert "@me" not in text
        (row,) = (line for line in text.splitlines() if "evil" in line and line.startswith("|"))
        assert row.replace("\\|", "").count("|") == 7
    assert "## Custom checks" in card
    assert "Custom checks" not in render_markdown(make_report())
    assert "custom-checks" not in render_html(make_report())


def test_junit_has_a_case_for_each() -> None:
    """By its own name, a failed one as a failure."""
    root = ET.fromstring(render_junit(with_checks(PASSED, FAILED)))
    cases = {case.get("name", ""): case for case in root.iter("testcase")}

    assert cases["custom.keeps_json"].find("failure") is None
    (evil,) = (case for name, case in cases.items() if name.startswith("custom.evil"))
    failure = evil.find("failure")
    assert failure is not None
    assert failure.get("type") == "FAIL"


def test_report_json_has_them_among_the_checks_and_is_read_back() -> None:
    """With the keys of the schema; what is null there is no number."""
    report = with_checks(PASSED, FAILED)
    document = json.loads(render_json(report))
    rows = document["artifacts"][0]["checks"]

    validator = jsonschema.Draft202012Validator(close(document_schema()))
    assert not list(validator.iter_errors(document))
    assert rows[-2]["custom"] == {
        "detail": "31 of 34 prompts",
        "function": "mine.json",
        "sha256": "a" * 64,
    }
    assert rows[0]["custom"] is None
    judgement = read_report(document).artifacts[0].judgement
    assert judgement.custom_checks == (PASSED, FAILED)
    assert judgement.checks == report.artifacts[0].judgement.checks


@pytest.mark.parametrize(
    ("checks", "words"),
    [
        ((PASSED,), " 1 custom check passes."),
        ((PASSED, PASSED), " 2 custom checks pass."),
        ((PASSED, FAILED), "1 of 2 custom checks failed. Do not serve or publish"),
    ],
)
def test_the_verdicts_sentence_counts_them(checks: tuple[CustomCheck, ...], words: str) -> None:
    """Beside limits, probes and tasks."""
    assert words in verdict_sentence(with_checks(*checks))


def test_the_command_line_has_a_line_for_each() -> None:
    """With its verdict; an artifact without any has none."""
    lines = render_plain(gate_reply(with_checks(PASSED), Path("out")).lines).splitlines()
    assert "check    keeps_json 0.910, limit 0.900: 31 of 34 prompts; PASS" in lines
    others = render_plain(gate_reply(make_report(), Path("out")).lines).splitlines()
    assert not any(line.startswith("check ") for line in others)
