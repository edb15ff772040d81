"""Tables and folds of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are Markdown already."""
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def fold(summary: str, body: str) -> str:
    """Return `body`, folded under one line of Markdown without markup."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"
