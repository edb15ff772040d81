"""A plan as the comment on a pull request."""

from __future__ import annotations

import re

import pytest

from quantkit.errors import InputError, PlanError, RecipeError
from quantkit.records import Plan
from quantkit.report.markdown import MOST_CHARACTERS
from quantkit.report.plan_markdown import SizeRow, name_plan, render_plan, render_refusal

MARK = name_plan(["awq4", "model"])
SIZES = (SizeRow("checkpoint", 16_000), SizeRow("gguf auto", 4_500, bound=True))


def make_plan(model: str = "org/model") -> Plan:
    """A plan of 8,000 weights, of which only the numbers are shown."""
    return Plan(
        model=model,
        family="llama",
        blocks=(),
        notes=(),
        scale_dtype="bfloat16",
        parameters=8_000,
        baseline_bytes=16_000,
        artifact_bytes=4_500,
        bits_per_weight=4.5,
        block_bytes=1,
        activation_bytes=1,
        statistics_bytes=1,
        disk_bytes=1,
    )


def render(notes: list[str], facts: list[tuple[str, str]] | None = None) -> str:
    return render_plan(
        make_plan(), mark=MARK, recipe="awq4", sizes=SIZES, facts=facts or [], notes=notes
    )


def test_sizes_stand_against_the_checkpoint() -> None:
    """Bits are counted against the weights; what is still to be chosen is a bound."""
    page = render(["a note"], [("time", "about 3 s")])

    assert page.startswith(f"{MARK}\n\n## ✅ Plan: `awq4` on `org/model`\n")
    assert "| checkpoint | 16.0 kB | 16.00 |  |" in page
    assert "| gguf auto | at most 4.50 kB | at most 4.50 | 3.56× smaller |" in page
    assert "| **time** | about 3 s |" in page
    assert page.endswith("### 1 note\n\n- a note\n")


def test_the_mark_is_that_of_the_question() -> None:
    """Another recipe, model or override is another comment; nothing in it can end it early."""
    marks = [name_plan(each) for each in (["a", "b"], ["a", "c"], ["a", "b", "k=v"], ["-->", ""])]

    assert len(set(marks)) == 4
    assert name_plan(["a", "b"]) == marks[0]
    assert all(mark.count("-->") == 1 and mark.endswith("-->") for mark in marks)


@pytest.mark.parametrize(
    "text",
    ["<img src=x>", "| a | b |", "@everyone", "[x](http://y)", "`code`", "a\n# b", "&lt;", "$x$"],
)
def test_what_others_wrote_is_shown_as_it_is(text: str) -> None:
    """In notes, in the table and in problems: no markup, no mention, no line of its own."""
    plan = render([text], [("layers", text)])
    refusal = render_refusal(PlanError([text]), mark=MARK, recipe="r", model=None)

    for page in (plan, refusal):
        # Without what is escaped, nothing of it is left that could be markup.
        bare = re.sub(r"\\[^\w\s]", "", page)
        assert text not in bare
        assert "\n# b" not in bare
        assert "<img" not in bare


def test_every_problem_is_listed_as_far_as_there_is_room() -> None:
    """A comment of GitHub's takes no more; what is left out is counted."""
    problems = [f"layer {number}: {'x' * 300}" for number in range(1000)]
    page = render_refusal(PlanError(problems), mark=MARK, recipe="awq4" * 500, model="m" * 5000)

    assert len(page) <= MOST_CHARACTERS
    assert "**1,000 problems found before any work**" in page
    shown = page.count("\n- layer")
    assert shown > 100
    assert f"- {1000 - shown:,} more problems: `quantkit plan` lists all\n" in page


def test_one_endless_problem_is_cut() -> None:
    """Three hundred thousand characters of an error are no comment."""
    page = render_refusal(InputError("<" * 300_000), mark=MARK, recipe="r", model="m")

    assert 2_000 < len(page) < 10_000


def test_the_headline_of_a_list_is_not_counted() -> None:
    """Errors that are lists begin with a line that says how many there are."""
    error = RecipeError("2 problems in r.yaml:\n  - first\n  - second")
    page = render_refusal(error, mark=MARK, recipe="r", model=None)

    assert "**2 problems found before any work**" in page
    assert page.endswith("\n\n- first\n- second\n")
