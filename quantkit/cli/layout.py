"""What people are shown, line by line: whole lines, sentences, tables; and how each is laid out.

Commands put replies together from these alone, so that nothing reaches a terminal which `printable`
has not seen, and nothing that strangers wrote is read as markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from quantkit.errors import printable

_GAP = 2
"""Spaces between columns."""
_LEAST_ROOM = 16
"""Columns that sentences in the last column get at least; with fewer, a row is a list."""
_PAIR = 2
"""Columns of a table of names and what is said about each."""
_MOST_WIDTH = 100
"""Columns that sentences take at most: longer lines are hard to read."""
_WORD = re.compile(r"`[^`\n]*`\S*|\S*\d (?:[kMGT]?B|s|min|h)(?!\w)\S*|\S+")
"""What a line does not end within: a word, what is quoted as code, a number and its unit."""

Span = tuple[str, str]
"""A text and rich's name of its style."""


@dataclass(frozen=True)
class Sentence:
    """Words that go on in the next line, below where they began."""

    label: str
    """In front of the first line, with the spaces behind it."""
    text: str
    mark: Cell | None = None
    """Stands between both, in a style of its own."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than its words."""

    text: str
    style: str = ""
    whole: bool = False
    """It is to be copied, as a path or a command: no line ends within it."""


@dataclass(frozen=True)
class Table:
    """Rows of cells; where a terminal has no room for the columns, each row becomes a list."""

    rows: tuple[tuple[Cell, ...], ...]
    has_titles: bool = False
    """The first row says what the columns are."""
    figures_from: int | None = None
    """The first of the columns that are aligned at their right."""


Line = str | Sentence | Table
"""A text is printed as it is: it may be there to be copied, and a terminal wraps it by itself."""


def make_table(
    rows: Iterable[Sequence[str | Cell]],
    *,
    has_titles: bool = False,
    figures_from: int | None = None,
) -> Table:
    """Return a table of names in bold and what is to be said about each."""
    made = []
    for row in rows:
        cells = [Cell(each) if isinstance(each, str) else each for each in row]
        first = cells[0]
        made.append((Cell(first.text, first.style or "bold", first.whole), *cells[1:]))
    return Table(tuple(made), has_titles, figures_from)


def lay_out(line: Line, width: int | None) -> Iterator[list[Span]]:
    """Yield the lines that `line` takes in `width` columns, each as spans; None is without end."""
    if isinstance(line, str):
        for part in printable(line, keep="\n\t").split("\n"):
            yield [(part, "")]
    elif isinstance(line, Sentence):
        yield from _lay_out_sentence(line, width)
    else:
        yield from _lay_out_table(line, width)


def wrap(text: str, room: int | None, taken: int = 0) -> list[str]:
    """Break a text between words; what is longer than the room is not broken.

    Args:
        room: columns of a line; None breaks nothing.
        taken: columns of the first line that are not there.
    """
    lines: list[str] = []
    for part in text.split("\n"):
        spent = 0 if lines else taken
        if room is None or spent + cell_len(part) <= room:
            lines.append(part)
            continue
        line = ""
        for word in _WORD.findall(part):
            if (line or spent) and spent + cell_len(f"{line} {word}") > room:
                lines.append(line)
                line, spent = word, 0
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
    return lines


def _lay_out_sentence(line: Sentence, width: int | None) -> Iterator[list[Span]]:
    label, text = printable(line.label, keep=""), printable(line.text)
    indent = cell_len(label)
    room = None if width is None else max(_LEAST_ROOM, min(width, _MOST_WIDTH) - indent)
    mark = [] if line.mark is None else [(printable(line.mark.text, keep=""), line.mark.style)]
    mark += [("  ", "")] if mark and text else []
    first, *rest = wrap(text, room, sum(cell_len(part) for part, _ in mark))
    yield [(label, ""), *mark, (first, "")]
    for each in rest:
        yield [(" " * indent + each, "")]


def _lay_out_table(table: Table, width: int | None) -> Iterator[list[Span]]:
    rows = [
        tuple(Cell(printable(cell.text), cell.style, cell.whole) for cell in row)
        for row in table.rows
    ]
    widths = _choose_widths(rows, width)
    if widths is not None:
        for row in rows:
            yield from _lay_out_row(row, widths, table.figures_from, width is not None)
    elif table.has_titles:
        yield from _list_rows(rows, width or _MOST_WIDTH)
    else:
        yield from _list_names(rows, width or _MOST_WIDTH)


def _choose_widths(rows: Sequence[Sequence[Cell]], width: int | None) -> list[int] | None:
    """The widths of the columns; None where they have no room beside each other."""
    count = max(map(len, rows), default=0)
    columns = [[row[at] for row in rows if at < len(row)] for at in range(count)]
    widths = [max(map(_natural, column)) for column in columns]
    if width is None or _sum(widths) <= min(width, _MOST_WIDTH):
        return widths
    return _fit(columns, widths, min(width, _MOST_WIDTH)) or _fit(columns, widths, width)


def _lay_out_row(
    row: Sequence[Cell], widths: Sequence[int], figures_from: int | None, wraps: bool
) -> Iterator[list[Span]]:
    """A row under its columns: as many lines as its tallest cell has."""
    parts = [
        wrap(cell.text, None if cell.whole or not wraps else room)
        for cell, room in zip(row, widths, strict=False)
    ]
    for at in range(max(map(len, parts))):
        spans: list[Span] = []
        for column, (cell, lines, room) in enumerate(zip(row, parts, widths, strict=False)):
            text = lines[at] if at < len(lines) else ""
            fill = " " * max(0, room - cell_len(text))
            at_right = figures_from is not None and column >= figures_from
            spans += [(fill, ""), (text, cell.style)] if at_right else [(text, cell.style)]
            if column < len(row) - 1:
                spans.append((" " * _GAP if at_right else fill + " " * _GAP, ""))
        yield spans


def _list_rows(rows: Sequence[Sequence[Cell]], width: int) -> Iterator[list[Span]]:
    """Each row as a list: its name, and below it the other cells with their titles."""
    titles = [cell.text for cell in rows[0]]
    label = max((cell_len(title) for title in titles[1:]), default=0)
    for name, *cells in rows[1:]:
        if name.text:
            yield from ([(part, name.style)] for part in name.text.split("\n"))
        for title, cell in zip(titles[1:], cells, strict=False):
            if cell.text:
                front = f"  {title}{' ' * (label - cell_len(title) + _GAP)}"
                room = None if cell.whole else max(_LEAST_ROOM, width - cell_len(front))
                for number, part in enumerate(wrap(cell.text, room)):
                    yield [(" " * cell_len(front) if number else front, ""), (part, cell.style)]


def _list_names(rows: Sequence[Sequence[Cell]], width: int) -> Iterator[list[Span]]:
    """Each row's name in a line of its own, and below it the other cells under their columns."""
    rest = [row[1:] for row in rows]
    room = width - _GAP
    widths = _choose_widths(rest, room)
    for (name, *_), cells in zip(rows, rest, strict=True):
        if name.text:
            yield from ([(part, name.style)] for part in name.text.split("\n"))
        if any(cell.text for cell in cells):
            for spans in _lay_out_row(cells, widths or [room] * len(cells), None, True):
                yield [(" " * _GAP, ""), *spans]


def _natural(cell: Cell) -> int:
    return max(map(cell_len, cell.text.split("\n")))


def _least(cell: Cell) -> int:
    """The width of what is not broken in a cell."""
    words = [cell.text] if cell.whole else _WORD.findall(cell.text)
    return max(map(cell_len, words), default=0)


def _sum(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _fit(columns: Sequence[Sequence[Cell]], widths: list[int], width: int) -> list[int] | None:
    """Narrow the widest columns until all fit, breaking between words; None where they do not.

    Of two columns the second may reach beyond, with a path or a command: a terminal goes on by
    itself, and nothing is won by another order.
    """
    least = [max(map(_least, column)) for column in columns]
    if len(least) <= _PAIR:
        least[-1] = min(least[-1], _LEAST_ROOM)
    if _sum(least) > width:
        return None
    fitted = list(widths)
    while _sum(fitted) > width:
        spare = [have - need for have, need in zip(fitted, least, strict=True)]
        widest = max((at for at in range(len(fitted)) if spare[at]), key=lambda at: fitted[at])
        fitted[widest] -= 1
    return fitted
