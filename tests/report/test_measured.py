"""What the gate measures besides its limits, on the page and in the other reports."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from quantkit.records import Metric, Probe, Report
from quantkit.report.advice import verdict_sentence
from quantkit.report.footprints import order_sentence
from quantkit.report.html import render_html
from quantkit.report.junit import render_junit
from quantkit.report.markdown import MOST_CHARACTERS, render_markdown
from quantkit.report.model_card import render_model_card
from quantkit.report.probes import probe_rows
from tests.report.hostile import make_hostile_comparison
from tests.report.measured import make_comparison, make_measured_report
from tests.report.page import Page, read
from tests.report.sample import make_judgement, make_report

REPORTS = {
    "pass": make_measured_report("PASS"),
    "fail": make_measured_report("FAIL"),
    "comparison": make_comparison(),
    "hostile": make_hostile_comparison(),
}

each_report = pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)


def titles(page: Page) -> list[str]:
    return [text.strip() for text in page.texts["h2"] if text.strip()]


def with_judgement(report: Report, **changes: object) -> Report:
    (artifact,) = report.artifacts
    judgement = replace(artifact.judgement, **changes)  # type: ignore[arg-type]
    return replace(report, artifacts=(replace(artifact, judgement=judgement),))


def test_page_tells_the_verdict_before_the_figures_and_the_evidence_last() -> None:
    """A reader in a hurry stops after the first screen."""
    found = titles(read(make_comparison()))

    assert found == [
        "Result",
        "Size against divergence",
        "Which differences are significant",
        "Footprint",
        "Checks",
        "Further metrics",
        "Tasks",
        "Behaviour",
        "Where they differ",
        "Worst windows",
        "Generations side by side",
        "Notes",
    ]


@each_report
def test_page_is_whole_and_can_be_used_without_a_mouse_or_eyes(report: Report) -> None:
    """Tables in labelled regions that take the focus, pictures with words, an unbroken outline."""
    page = read(report)
    regions = [a for a in page.all("div") if a.get("class") == "scroll"]
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]

    assert len(regions) == len(page.all("table"))
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    assert max(ids.values()) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert not [tag for tag, a in page.elements if "style" in a or any(n[:2] == "on" for n in a)]


def test_hostile_text_stays_text_on_the_page() -> None:
    """Domains, tokens, prompts, tasks and names are shown and not obeyed."""
    html = render_html(REPORTS["hostile"])

    assert "<script>alert" not in html
    assert "<img src=http" not in html
    assert Page(html).text.count("<script>alert(1)</script>") > 100
    html.encode()


def test_hostile_text_stays_text_in_the_other_reports() -> None:
    """XML is valid, and Markdown has no markup from a token or a prompt."""
    ET.fromstring(render_junit(REPORTS["hostile"]).encode())
    folds = re.findall(r"<summary>(.*)</summary>", render_markdown(REPORTS["hostile"]))

    assert folds
    assert all(re.fullmatch(r"[\w ,]+", summary) for summary in folds)


def test_what_was_not_measured_has_no_section() -> None:
    """A report as gates of before gave it shows nothing new."""
    found = titles(read(make_report()))

    assert found == ["Result", "Checks", "Layers", "Notes", "Evidence"]


def test_places_kinds_of_text_and_positions_are_in_tables() -> None:
    """The picture is not the only place for the numbers."""
    text = read(make_measured_report()).text

    for figure in ("65–256", "257–511", "documentation", "42,311", "+1.71%", "-0.310%"):
        assert figure in text


def test_both_candidates_and_the_token_that_came_are_shown_where_models_part() -> None:
    """With white space that can be seen, and words beside the bars."""
    text = read(make_measured_report()).text

    assert (
        "The baseline would go on with “␣replace” (62.1%), the artifact with “␣True” (41.9%)."
        in text
    )
    assert "Both hold “␣test” for the most probable: the baseline with 50.0%, the artifact" in text
    assert text.count("came next") == 3


def test_continuations_are_cut_where_they_part() -> None:
    """Those that part come first, and the common beginning is dimmed in both."""
    html = render_html(make_measured_report())
    common = re.findall(r'<span class="common">(.*?)</span>', html, re.DOTALL)

    assert common[:2] == [" A checksum shows whether a file has been "] * 2
    assert "2 of 6 are the same to the end" in html
    assert html.index("they part at once") < html.index("the same to the end, 4 tokens")


def test_a_pass_counts_the_probes_that_hold_and_names_what_was_not_looked_at() -> None:
    """A probe without a value proves nothing and is not hidden."""
    sentence = verdict_sentence(make_measured_report("PASS"))

    assert sentence == (
        "Every limit holds: the whole 95% interval of each check and task lies within it, and "
        "3 probes of behaviour hold too. 1 probe was not looked at."
    )


def test_a_failure_names_checks_probes_and_tasks() -> None:
    """Of each kind how many failed of those with a limit."""
    sentence = verdict_sentence(make_measured_report("FAIL"))
    assert sentence.startswith("All 3 checks, 1 of 4 probes and the only task failed.")

    checks = make_judgement("PASS").checks
    sentence = verdict_sentence(with_judgement(make_measured_report("FAIL"), checks=checks))
    assert sentence.startswith("1 of 4 probes and the only task failed.")


def test_a_level_is_named_only_where_all_intervals_have_it() -> None:
    """Those of tasks have the recipe's, those of checks a look's share of it."""
    report = with_judgement(make_measured_report("PASS"), looks=(64, 128), confidence=0.975)
    assert "the whole confidence interval of each check and task" in verdict_sentence(report)
    assert "the whole 97.5% interval of each check" in verdict_sentence(
        with_judgement(report, tasks=())
    )


def test_a_task_that_is_undecided_is_named() -> None:
    """Whether its interval reaches across the limit or too little was asked."""
    first, second = make_measured_report("PASS").artifacts[0].judgement.tasks
    report = replace(make_measured_report("PASS"), verdict="INCONCLUSIVE")
    for low, words in ((0.96, "reaches across the limit."), (0.98, "too little was measured.")):
        tasks = (replace(first, low=low, verdict="INCONCLUSIVE"), second)
        sentence = verdict_sentence(with_judgement(report, tasks=tasks))
        assert sentence.startswith("The only task cannot be decided: ")
        assert sentence.endswith(words)


def test_a_probe_beyond_its_limit_does_not_look_equal_to_it() -> None:
    """More digits where three do not tell them apart."""
    probes = (Probe("special_tokens", 0.10004, 0.1, "FAIL", "of 5 tokens"),)
    (artifact,) = with_judgement(make_measured_report("FAIL"), probes=probes).artifacts
    (row,) = probe_rows(artifact)
    assert (row.value, row.limit) == ("0.10004 nats", "at most 0.10000 nats")


def test_no_order_is_said_that_a_difference_contradicts() -> None:
    """Artifacts that were judged on different windows, beside those that both have."""
    report = make_comparison()
    smallest, closest = report.artifacts[1].name, report.artifacts[-1].name
    turned = tuple(
        replace(each, kl=Metric(-each.kl.value, -each.kl.high, -each.kl.low))
        if {each.first, each.second} == {smallest, closest}
        else each
        for each in report.differences
    )
    sentence = verdict_sentence(replace(report, differences=turned))
    assert sentence.endswith(
        f"On the windows that both were measured on, {smallest} is the closer one: take it."
    )
    alone = tuple(each for each in report.artifacts if each.name in (smallest, closest))
    pair = replace(report, artifacts=alone)
    assert order_sentence(pair) == f"From the closest to the furthest: {closest}, then {smallest}."
    assert order_sentence(replace(pair, differences=turned)) == ""


def test_a_comparison_says_what_is_not_told_apart() -> None:
    """The smaller of two that are alike is as good as the closest."""
    report = make_comparison()
    sentence = verdict_sentence(report)

    assert "demo-llama-Q4_K_M.gguf is the smallest (3.78 MB, KL 0.0219)" in sentence
    assert sentence.endswith("demo-llama-Q6_K.gguf (5.63 MB) is not told apart from the closest.")
    alike = tuple(replace(each, significant=False) for each in report.differences)
    sentence = verdict_sentence(replace(report, differences=alike))
    assert sentence.endswith("Their difference is not significant: take demo-llama-Q4_K_M.gguf.")


def test_a_smaller_artifact_that_is_undecided_is_named() -> None:
    """More windows may make it the better choice."""
    first, *rest = make_comparison().artifacts
    judgement = replace(first.judgement, verdict="INCONCLUSIVE")
    artifacts = (replace(first, judgement=judgement), *rest)

    sentence = verdict_sentence(replace(make_comparison(), artifacts=artifacts))

    assert sentence.endswith(" Smaller and undecided: demo-llama-IQ3_M.gguf.")


@each_report
def test_markdown_fits_into_a_comment(report: Report) -> None:
    """Tables of tasks and of probes that want a look are open, the rest is folded."""
    text = render_markdown(report)

    assert len(text) <= MOST_CHARACTERS
    assert text.index("### Tasks") < text.index("### Behaviour") < text.index("worst windows")


def test_markdown_that_is_too_long_says_what_it_leaves_out() -> None:
    """What matters least goes first; verdict, reasons and table stay."""
    report = make_comparison(tuple(f"type-{number}" for number in range(40)))
    text = render_markdown(report)

    assert len(text) <= MOST_CHARACTERS
    assert text.startswith("## ✅ PASS")
    assert "demo-llama-type-39.gguf" in text
    (line,) = [line for line in text.splitlines() if line.startswith("Left out")]
    assert "continuations, worst windows" in line
    assert line.endswith("report.html has all.")


def test_markdown_of_a_table_that_is_too_long_is_cut() -> None:
    """The verdict remains."""
    text = render_markdown(make_report(artifacts=500, blocks=0))

    assert len(text) <= MOST_CHARACTERS
    assert text.startswith("## ✅ PASS")
    assert "the end of this page. report.html has all." in text.splitlines()[-1]


def test_markdown_shows_only_probes_that_want_a_look() -> None:
    """Those that hold are a number, and all are in a fold."""
    text = render_markdown(make_measured_report("FAIL"))
    shown = text.partition("### Behaviour")[2].partition("<details>")[0]

    assert "New loops" in shown
    assert "Lost JSON answers" in shown
    assert "Changed endings" not in shown
    assert "Other probes: 2 within their limits, 1 without a limit." in shown


def test_each_probe_and_task_with_a_limit_is_a_case() -> None:
    """A CI follows them over time as it does checks; what was not looked at is skipped."""
    root = ET.fromstring(render_junit(make_measured_report("FAIL")))
    cases = {str(case.get("name")): [child.tag for child in case] for case in root.iter("testcase")}

    assert cases["probe.new_loops"] == ["failure"]
    assert cases["probe.long_context"] == []
    assert cases["probe.lost_json"] == ["skipped"]
    assert cases["task.arc_easy"] == ["failure"]
    assert not {"probe.special_tokens", "task.wikitext"} & set(cases)
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("9", "6", "1")
    properties = {p.get("name"): p.get("value") for p in root.iter("property")}
    assert properties["memory_bytes"] == "612368384"


def test_model_card_has_tasks_and_behaviour_and_no_timing() -> None:
    """What a reader of the Hub asks first: does it still do its work."""
    report = make_measured_report("PASS")
    card = render_model_card(report, report.artifacts[0])

    assert "| arc_easy | acc | 570 | 0.4123 → 0.4083 |" in card
    assert "- New loops 4.17%, at most 25.0%" in card
    assert "not looked at: the baseline gives no valid JSON either. UNJUDGED." in card
    assert "tokens/s" not in card
