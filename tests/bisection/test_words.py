"""A bisection in words: rows, lines and a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

from markdown_it import MarkdownIt

from quantkit.bisection.records import Bisection, Proposal, Suspect
from quantkit.bisection.words import MOST_ROWS, list_facts, list_proposal, list_rows, write_results
from tests.report.hostile import HOSTILE
from tests.report.sample import make_judgement

RECIPE = "quantize:\n  overrides:\n  - match: '*.mlp.down_proj'\n    scheme: w8a16\n"


def make_bisection(names: str = "x") -> Bisection:
    """An answer with a proposal, whose every text ends with `names`."""
    suspects = tuple(
        Suspect(f"layers.{number} {names}", 0.02, 0.3, None, 4000)
        for number in range(MOST_ROWS + 3)
    )
    return Bisection(
        artifact=f"out/{names}",
        baseline=names,
        format="compressed-tensors",
        scheme="w4a16",
        outcome="budget",
        summary=f"The largest share is that of {names}",
        windows=16,
        window_tokens=256,
        kl=0.06,
        kl_restored=0.0,
        perplexity_increase=-0.001,
        top1_agreement=0.9,
        limits={"max_kl": 0.05},
        blocks=suspects,
        units=(),
        guilty=(names,),
        proposal=Proposal("w8a16", (names,), RECIPE, 5000, 5.0, make_judgement("PASS")),
        judgement=None,
        tensor_bytes=4000,
        bits_per_weight=4.0,
        notes=(names,),
        seconds=1.0,
    )


def test_names_of_strangers_are_no_markup_on_the_page(tmp_path: Path) -> None:
    """Nor do they break its tables or its recipe."""
    (tmp_path / "out").mkdir()
    write_results(make_bisection(HOSTILE), tmp_path / "out")
    page = (tmp_path / "out" / "bisect.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(page)

    assert not re.search("[\x00\x1b\u202e]", page)
    assert not {"html_block", "hr"} & {token.type for token in tokens}
    inner = {child.type for token in tokens for child in token.children or []}
    assert inner <= {"text", "code_inline", "strong_open", "strong_close", "text_special"}
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + MOST_ROWS + 1
    assert [token.content for token in tokens if token.type == "fence"] == [RECIPE]
    document = json.loads((tmp_path / "out" / "bisect.json").read_text())
    assert document["guilty"] == [HOSTILE]


def test_what_a_table_leaves_out_is_counted() -> None:
    """The document has all."""
    titles, *rows = list_rows(make_bisection().blocks)
    assert {len(row) for row in rows} == {len(titles)}
    assert rows[-1][0] == "... and 3 more"
    assert list(list_rows(make_bisection().blocks[:2]))[-1][0] == "layers.1 x"


def test_limits_are_told_from_what_was_measured() -> None:
    """Each check with its interval, and a gain with its sign."""
    facts = dict(list_facts(make_bisection()))
    assert (facts["KL"], facts["perplexity"]) == ("0.0600 (limit 0.0500)", "-0.100%")
    first, size, *_ = list_proposal(make_bisection())
    assert "0.0123 (0.0118 to 0.0128), at most 0.0500: PASS" in first
    assert size == "size: 4.00 kB, 4.00 bits per weight; with the proposal 5.00 kB, 5.00"
