"""The last lines of a sweep: the table, what to take, what failed, and where the pages are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.cli.console import Reply
from quantkit.cli.layout import Cell, Line, Sentence, Table, make_table
from quantkit.sweeping.rows import TITLES, sweep_document, sweep_rows

if TYPE_CHECKING:
    from quantkit.sweeping.records import SweepResult

_STYLES = {"PASS": "bold green", "FAIL": "bold red", "ERROR": "bold red"}
_OTHER_STYLE = "bold yellow"
_TEXTS = 2
"""The first columns; those behind them hold figures."""


def sweep_reply(result: SweepResult) -> Reply:
    """What `quantkit sweep` says at its end."""
    lines: list[Line] = ["", _make_table(result), ""]
    for model, sentence in result.choices.items():
        lines.append(Sentence("model    ", f"{model}: {sentence}"))
    for outcome in result.outcomes:
        if outcome.error is not None:
            lines.append(Sentence("error    ", f"{outcome.job.name}: {outcome.error}"))
            lines.append(f"log      {outcome.job.log}")
    lines += [f"compare  {page}" for page in result.reports.values()]
    if result.reports:
        lines.append(f"reports  {result.output_root / '*' / 'report' / 'report.html'}")
    lines.append(f"table    {result.output_root / 'sweep.md'}")
    return Reply(sweep_document(result), lines, result.exit_code)


def _make_table(result: SweepResult) -> Table:
    rows = [[Cell(title, "bold") for title in TITLES]]
    for row in sweep_rows(result):
        name, verdict, *figures = row.cells
        style = _STYLES.get(row.verdict, _OTHER_STYLE)
        rows.append([Cell(name), Cell(verdict, style), *map(Cell, figures)])
    return make_table(rows, has_titles=True, figures_from=_TEXTS)
