"""report.html in a real browser: `make browser` finds or installs Chromium and runs these."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantkit
from quantkit.recipe import GateSpec
from quantkit.report.html import render_html
from tests.e2e.chromium import Tab, open_page
from tests.helpers import pico_text
from tests.pico_jobs import make_pico_job
from tests.report.hostile import make_hostile_comparison, make_hostile_report
from tests.report.measured import make_comparison, make_measured_report
from tests.report.sample import make_encoder_report

pytestmark = pytest.mark.browser

PHONE = 390
SCHEMES = ("light", "dark")

REPORTS = {
    "pass": make_measured_report("PASS"),
    "fail": make_measured_report("FAIL"),
    "comparison": make_comparison(),
    "encoder": make_encoder_report("INCONCLUSIVE"),
    "hostile": make_hostile_report(),
    "hostile comparison": make_hostile_comparison(),
}

_CONTRASTS = """
(() => {
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+(?:e-?\\d+)?/g).map(Number);
    const unit = text.startsWith("color(") ? 255 : 1;
    const [r, g, b, a = 1] = numbers;
    return [r * unit, g * unit, b * unit, a];
  };
  const over = (top, ground) =>
    top.slice(0, 3).map((c, i) => c * top[3] + ground[i] * (1 - top[3]));
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = (rgb) => rgb.map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const says = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!says || !element.checkVisibility() || element.closest("title, script, .unseen")) continue;
    const style = getComputedStyle(element);
    const behind = ground(element);
    const ink = over(parse(element.closest("svg") ? style.fill : style.color), behind);
    const [dark, bright] = [light(ink), light(behind)].sort((a, b) => a - b);
    const kind = `${element.localName}.${element.getAttribute("class") ?? ""}`;
    const ratio = (bright + 0.05) / (dark + 0.05);
    found[kind] = Math.min(found[kind] ?? 99, ratio);
  }
  return found;
})()
"""
"""Of each kind of element with text the lowest contrast of that to what is painted behind it."""

_OPEN_ALL = "document.querySelectorAll('details').forEach((each) => { each.open = true; })"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a real job, and pages of reports with everything that there can be."""
    folder = tmp_path_factory.mktemp("pages")
    job = make_pico_job(folder, quantize={"scheme": "w4a16", "group_size": 32})
    gate = {"data": str(folder / "text.txt"), "samples": 8, "sequence_length": 64}
    (folder / "text.txt").write_text(pico_text(2000, 3))
    quantkit.quantize(job.model_copy(update={"gate": GateSpec(**gate)}), device="cpu")
    found = {"job": folder / "out" / "report" / "report.html"}
    for name, report in REPORTS.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(render_html(report), encoding="utf-8")
    return found


@pytest.fixture(params=["job", *REPORTS])
def name(request: pytest.FixtureRequest) -> str:
    """Which page."""
    return str(request.param)


@pytest.fixture
def tab(pages: dict[str, Path], name: str, tmp_path: Path) -> Iterator[Tab]:
    """The page in a browser of its own."""
    with open_page(os.environ["QUANTKIT_CHROMIUM"], pages[name], tmp_path) as found:
        yield found


def test_a_reader_gets_the_verdict_from_a_page_that_asks_for_nothing(
    tab: Tab, pages: dict[str, Path], name: str
) -> None:
    """One request, for the file; nothing on the console; the policy blocks nothing of our own."""
    verdict = tab.ask("document.querySelector('.verdict .word').textContent")
    title = tab.ask("document.title")
    for scheme in SCHEMES:
        tab.scheme(scheme)
        tab.ask(_OPEN_ALL)
    tab.ask("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")
    methods = [event.get("method") for event in tab.events]
    asked = [
        event["params"]["request"]["url"]
        for event in tab.events
        if event.get("method") == "Network.requestWillBeSent"
    ]

    assert verdict in ("PASS", "FAIL", "INCONCLUSIVE")
    assert title.startswith(f"{verdict}: ")
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    loud = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in tab.events if event.get("method") in loud] == []
    assert "Page.loadEventFired" in methods
    assert "Page.javascriptDialogOpening" not in methods


def test_every_picture_has_words_for_those_who_do_not_see_it(tab: Tab) -> None:
    """As the browser tells a screen reader; every table has a name around it and titles in it."""
    tab.ask(_OPEN_ALL)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    kinds: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            name = node.get("name", {}).get("value", "")
            kinds.setdefault(node["role"]["value"], []).append(name)
    pictures = tab.ask("document.querySelectorAll('svg:not([aria-hidden])').length")
    tables = tab.ask("document.querySelectorAll('table').length")

    assert len(kinds["image"]) == pictures > 0
    assert all(kinds["image"])
    assert len(kinds["table"]) == tables
    assert len(kinds["region"]) >= tables
    assert all(all(kinds[kind]) for kind in ("region", "columnheader", "heading"))


def test_nothing_is_wider_than_a_phone(tab: Tab) -> None:
    """The page scrolls downwards only; what is wide scrolls inside of its own region."""
    outside = """[...document.querySelectorAll('body *')].filter((each) => each.checkVisibility()
      && !each.closest('.scroll, pre, svg, .unseen')
      && each.getBoundingClientRect().right > innerWidth + 0.5).map((each) => each.outerHTML)"""
    tab.size(PHONE, 844, phone=True)
    tab.ask(_OPEN_ALL)
    for scheme in SCHEMES:
        tab.scheme(scheme)

        assert tab.ask("innerWidth") == PHONE
        assert tab.ask("document.documentElement.scrollWidth") == PHONE
        assert tab.ask(outside) == []


def test_text_stands_out_from_what_it_stands_on(tab: Tab) -> None:
    """4.5 to 1 (WCAG AA), by the colours that the browser computes, for every text there is."""
    tab.ask(_OPEN_ALL)
    grounds = set()
    for scheme, width in itertools.product(SCHEMES, (PHONE, 1100)):
        tab.scheme(scheme)
        tab.size(width, 900, phone=width == PHONE)
        contrasts = tab.ask(_CONTRASTS)
        grounds.add(tab.ask("getComputedStyle(document.body).backgroundColor"))

        assert {"p.sentence", "p.word", "p.lead", "p.eyebrow"} <= set(contrasts)
        assert any(kind.startswith("span.badge") for kind in contrasts)
        assert {kind: ratio for kind, ratio in contrasts.items() if ratio < 4.5} == {}
    assert len(grounds) == len(SCHEMES)


@pytest.mark.parametrize("name", ["job", "fail"], indirect=True)
def test_titles_of_the_layer_table_sort_it(tab: Tab) -> None:
    """By a click, and by the keyboard; the order is announced."""
    tab.ask(_OPEN_ALL)
    column = 4
    tab.ask("window.sorted = [...document.querySelectorAll('table[data-sortable]')].at(-1)")
    values = f"""[...sorted.tBodies[0].rows].map((row) => row.cells[{column}].dataset.sort)
      .filter((text) => text !== "").map(Number)"""
    place = f"""(() => {{
      const button = sorted.tHead.rows[0].cells[{column}].querySelector("button");
      button.scrollIntoView({{block: "center"}});
      const box = button.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    }})()"""
    before = tab.ask(values)
    x, y = tab.ask(place)
    tab.click(x, y)
    falling = tab.ask(values)
    tab.press("Enter")
    rising = tab.ask(values)

    assert len(before) > 3
    assert before != falling == sorted(before, reverse=True)
    assert rising == sorted(before)
    assert tab.ask(f"sorted.tHead.rows[0].cells[{column}].getAttribute('aria-sort')") == "ascending"
    said = tab.ask("sorted.parentElement.querySelector('[role=status]').textContent")
    assert said == "Sorted by Output error, ascending"


@pytest.mark.parametrize("name", ["job", "comparison"], indirect=True)
def test_the_tab_key_reaches_everything_that_scrolls_or_folds(tab: Tab) -> None:
    """In the order of the page, and with an outline around what has the focus."""
    tab.ask(_OPEN_ALL)
    tab.ask("document.body.focus()")
    focusable = "'summary, [tabindex=\"0\"], button'"
    tab.ask(
        f"document.querySelectorAll({focusable}).forEach((each, i) => {{ each.dataset.n = i; }})"
    )
    count = tab.ask(f"document.querySelectorAll({focusable}).length")
    seen = []
    for _ in range(count):
        tab.press("Tab")
        number, outline = tab.ask(
            "((each) => [each.dataset.n, getComputedStyle(each).outlineStyle])"
            "(document.activeElement)"
        )
        seen.append(number)
        assert outline != "none"

    assert seen == [str(number) for number in range(count)]
    assert tab.ask("document.querySelectorAll('.scroll').length") > 0
    assert tab.ask("[...document.querySelectorAll('.scroll')].every((each) => each.dataset.n)")
