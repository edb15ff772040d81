from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from itertools import pairwise

import pytest

from quantkit.records import Report, Verdict
from quantkit.report.html import render_html
from tests.report.hostile import make_hostile_report
from tests.report.page import Page, read
from tests.report.sample import LINEARS, RECIPE, make_report

VERDICTS: tuple[Verdict, ...] = ("PASS", "FAIL", "INCONCLUSIVE", "UNJUDGED")


@pytest.mark.parametrize("verdict", VERDICTS)
def test_page_is_well_formed_and_says_the_verdict(verdict: Verdict) -> None:
    """Every element is closed; title, banner and table name the verdict in words."""
    page = read(make_report(verdict))

    assert "".join(page.texts["title"]).startswith(f"{verdict}: ")
    assert verdict in [text.strip() for text in page.texts["p"]]
    assert verdict in page.texts["span"]
    assert any(verdict in (attributes.get("class") or "") for attributes in page.all("div"))


def test_page_shows_every_figure_of_the_headline_table() -> None:
    """Size, bits per weight, perplexity, KL and agreement are on the page with intervals."""
    text = read(make_report("PASS")).text

    for figure in ("4.11 MB", "3.06× smaller", "5.23", "12.41 → 12.64", "+1.52% to +2.14%"):
        assert figure in text
    for figure in ("0.0123", "0.0118 to 0.0128", "94.2%", "93.8% to 94.6%", "at most 3.00%"):
        assert figure in text


@pytest.mark.parametrize("report", [make_report("FAIL", blocks=3), make_hostile_report()])
def test_page_loads_nothing(report: Report) -> None:
    """No element, style or script refers to anything outside of the file."""
    page = read(report)

    for tag, attributes in page.elements:
        for name in ("src", "srcset", "action", "data", "poster", "background", "xlink:href"):
            assert name not in attributes, f"{tag} has {name}"
        href = attributes.get("href")
        assert href is None or href.startswith(("#", "data:"))
    assert not {"iframe", "object", "embed", "img", "base", "form"} & {t for t, _ in page.elements}
    style = "".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    script = "".join(page.texts["script"])
    assert not re.search(r"fetch|XMLHttpRequest|import\s*\(|WebSocket|https?:", script)


def test_policy_allows_only_the_page_s_own_script_and_style() -> None:
    """The page's security policy has no network and the hashes of its one script and one style."""
    page = read(make_hostile_report())
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv")) or ""

    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        assert len(page.all(tag)) == 1
        digest = hashlib.sha256("".join(page.texts[tag]).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_no_element_has_an_inline_style_or_handler() -> None:
    """What the policy would block is not there in the first place."""
    for tag, attributes in read(make_hostile_report()).elements:
        assert "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    """Script, markup and template code in names are text; control characters are replaced."""
    html = render_html(make_hostile_report())
    page = Page(html)

    assert "<script>alert" not in html
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }} {% x %}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\u202e]", html)
    html.encode()


def test_failure_lists_its_reasons_before_anything_else() -> None:
    """The reasons of a FAIL come before the advice, and the advice before the figures."""
    report = make_report("FAIL")
    text = read(report).text
    reason = text.index(report.artifacts[0].judgement.reasons[0])

    assert text.index("FAIL") < reason < text.index("What to try") < text.index("Bits/weight")


def test_pass_gives_no_advice() -> None:
    """There is nothing to try after a PASS."""
    assert "What to try" not in read(make_report("PASS")).text


def test_every_layer_is_in_the_table_with_its_fallback_marked() -> None:
    """The table in `details` has a row a layer; the plot is not the only place for the numbers."""
    report = make_report("PASS", blocks=32)
    page = read(report)
    headers = [text for text in page.texts["th"] if text in {layer.name for layer in report.layers}]

    assert headers == [layer.name for layer in report.layers]
    assert len(report.layers) == 32 * 7
    rows = [attributes for attributes in page.all("tr") if attributes.get("class")]
    assert [row["class"] for row in rows if row["class"] == "fallback-row"] == ["fallback-row"]
    assert "1 layer was not solved as asked" in page.text
    assert "<details>" in render_html(report)


def test_many_layers_give_one_panel_for_each_kind_of_linear() -> None:
    """32 blocks of 7 layers are seven panels with a text alternative each."""
    page = read(make_report("PASS", blocks=32))
    names = [str(svg.get("aria-label")) for svg in page.all("svg") if svg.get("class") == "plot"]
    panels = [name for name in names if name.startswith("Output error of ")]

    assert [name.split()[3] for name in panels] == [kind.rpartition(".")[2] for kind in LINEARS]
    assert all("table below" in name for name in panels)


def test_page_works_without_script_and_buttons_are_made_by_it() -> None:
    """Without the script there is no control that would do nothing."""
    page = read(make_report())

    assert page.all("button") == []
    assert [t for t in page.all("table") if "data-sortable" in t]


def test_tables_scroll_inside_and_can_be_reached_by_keyboard() -> None:
    """Every table lies in a labelled region that takes the focus."""
    page = read(make_report())
    regions = [d for d in page.all("div") if d.get("class") == "scroll"]

    assert len(regions) == len(page.all("table")) == 2
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)


def test_every_picture_has_words_or_is_hidden_from_readers() -> None:
    """Each SVG is labelled, or marked as decoration beside the same words."""
    for attributes in read(make_report("FAIL")).all("svg"):
        labelled = attributes.get("role") == "img" and attributes.get("aria-label")
        assert labelled or attributes.get("aria-hidden") == "true"


def test_ids_are_unique_and_headings_do_not_skip_a_level() -> None:
    """Labels point at one element, and the outline is that of the page."""
    page = read(make_report("INCONCLUSIVE", artifacts=3))
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    labels = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]

    assert max(ids.values()) == 1
    assert labels <= set(ids)
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_recipe_is_verbatim() -> None:
    """The recipe is on the page as it was written, with what the command line changed."""
    page = read(make_report())

    assert any(RECIPE.strip() == text.strip() for text in page.texts["pre"])
    assert "quantize.group_size=128" in page.texts["pre"]


def test_report_without_layers_notes_or_evidence_has_no_empty_sections() -> None:
    """A gate on somebody else's artifact knows no layers."""
    report = make_report("PASS", blocks=0)
    page = read(Report(report.model, 0, report.artifacts, "PASS", (), (), {}))
    titles = [text.strip() for text in page.texts["h2"]]

    assert titles == ["Result", "Checks"]


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_that_wcag_aa_asks_for(scheme: int) -> None:
    """Text has 4.5:1 on every ground that it stands on; lines of the plot have 3:1."""
    style = "".join(read(make_report()).texts["style"])
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))

    for ground in ("page", "surface", "raised"):
        for ink in ("text", "muted"):
            assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for verdict in ("pass", "fail", "inconclusive", "unjudged"):
        for ink in (verdict, "text"):
            assert _contrast(colours[ink], colours[f"{verdict}-tint"]) >= 4.5, (ink, verdict)
        assert _contrast(colours[verdict], colours["raised"]) >= 3, verdict
    for line in ("accent", "rounding", "inconclusive"):
        assert _contrast(colours[line], colours["surface"]) >= 3, line
