from __future__ import annotations

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from quantkit.records import Verdict
from quantkit.report.markdown import MOST_LAYERS, render_markdown
from quantkit.report.text import code_block, code_span, escape_markdown
from tests.report.hostile import HOSTILE, make_hostile_report
from tests.report.sample import RECIPE, make_report

PARSER = MarkdownIt("commonmark").enable("table")


def parse(text: str) -> list[Token]:
    """All tokens of a text, inline ones too."""
    found: list[Token] = []
    for token in PARSER.parse(text):
        found += [token, *(token.children or [])]
    return found


def shown(tokens: list[Token]) -> str:
    """The text that a reader sees."""
    kinds = {"text", "code_inline", "fence"}
    return " ".join(token.content for token in tokens if token.type in kinds)


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE", "UNJUDGED"])
def test_verdict_is_in_the_title_and_in_the_table(verdict: Verdict) -> None:
    """A reader of the pull request sees the verdict first."""
    text = render_markdown(make_report(verdict))

    assert verdict in text.splitlines()[0]
    assert f"| **{verdict}** |" in text


def test_tables_have_as_many_cells_in_each_row_as_titles() -> None:
    """A parser of GitHub's tables finds every row whole."""
    tokens = parse(render_markdown(make_hostile_report()))
    width = cells = 0
    for token in tokens:
        if token.type == "thead_open":
            width = 0
        width += token.type == "th_open"
        cells = 0 if token.type == "tr_open" else cells + (token.type == "td_open")
        if token.type == "tr_close" and cells:
            assert cells == width
    assert width


def test_hostile_text_makes_no_markup() -> None:
    """No link, image, script or emphasis comes out of a name; only our own folds are HTML."""
    tokens = parse(render_markdown(make_hostile_report()))
    html = [t.content.strip() for t in tokens if t.type in ("html_block", "html_inline")]

    assert not {"link_open", "image", "em_open"} & {token.type for token in tokens}
    for piece in html:
        assert re.fullmatch(r"(<details>\n<summary>[\w ,]+</summary>|</details>)", piece)
    assert "<script>alert(1)</script>" in shown(tokens)
    assert "@everyone" not in re.sub("`+[^`]*`+", "", escape_markdown(HOSTILE))
    assert "www." not in escape_markdown("see www.evil.example")


@pytest.mark.parametrize(
    "text",
    [
        "a|b",
        "- x",
        "1. x",
        "# x",
        "> x",
        "*a* _b_ `c`",
        "<b>",
        "a\nb",
        "max_kl __init__ _x_",
        "4.11 (3)",
        "7)",
        "+1",
    ],
)
def test_escaped_text_is_read_back_as_it_was(text: str) -> None:
    """What is escaped parses as one paragraph with the same text."""
    tokens = PARSER.parse(escape_markdown(text))

    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert "".join(child.content for child in children) == " ".join(text.split())


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`", " ", "x``y`z", "a|b"])
def test_code_span_is_read_back_as_it_was(text: str) -> None:
    """Backticks inside do not end it."""
    (inline,) = [
        token for token in PARSER.parse(code_span(text) + " end") if token.type == "inline"
    ]
    (code,) = [child for child in inline.children or [] if child.type == "code_inline"]

    assert code.content.strip() == text.strip()


def test_code_block_cannot_be_closed_from_inside() -> None:
    """The fence is longer than any in the text."""
    tokens = PARSER.parse(code_block("a\n````\n# not a title\n~~~", "yaml"))

    assert [token.type for token in tokens] == ["fence"]
    assert tokens[0].content == "a\n````\n# not a title\n~~~\n"


def test_recipe_is_verbatim() -> None:
    """The recipe is in a fold, as it was written."""
    fences = [t.content for t in parse(render_markdown(make_report())) if t.type == "fence"]

    assert RECIPE in fences


def test_failure_lists_reasons_then_advice_then_figures() -> None:
    """What is wrong and what to do comes before the numbers."""
    report = make_report("FAIL")
    text = render_markdown(report)

    assert text.index("0\\.0912" if "0\\.0912" in text else "0.0912") < text.index("What to try")
    assert text.index("What to try") < text.index("| Artifact |")


def test_report_of_a_large_model_fits_into_a_comment() -> None:
    """Beyond `MOST_LAYERS` only the worst layers are listed, and the text says so."""
    report = make_report("PASS", blocks=200)
    text = render_markdown(report)

    assert f"the {MOST_LAYERS} with the largest error" in text
    assert len(text) < 65_536
    worst = max(report.layers, key=lambda layer: layer.relative_error or 0)
    assert worst.name in text


def test_report_without_anything_is_still_a_report() -> None:
    """No artifact, layer, note or evidence: the verdict remains."""
    report = replace(
        make_report("UNJUDGED"), artifacts=(), layers=(), notes=(), evidence={}, model=""
    )

    assert render_markdown(report).startswith("## ⬜ UNJUDGED")
