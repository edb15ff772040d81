"""A page taken apart, to look at what a browser would find."""

from __future__ import annotations

from html.parser import HTMLParser

from quantkit.records import Report
from quantkit.report.html import render_html

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, and text by enclosing element."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of {tag} is given twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of a kind."""
        return [attributes for found, attributes in self.elements if found == tag]

    @property
    def text(self) -> str:
        """All text that a reader sees."""
        shown = [
            t for tag, texts in self.texts.items() if tag not in ("script", "style") for t in texts
        ]
        return " ".join(" ".join(shown).split())


def read(report: Report) -> Page:
    """Render a report; every element of it is closed."""
    page = Page(render_html(report))
    assert page.open == []
    return page
