"""The last lines of a sweep: the table, what to take, what failed, and where the pages are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from quantkit.cli.console import Reply, printable
from quantkit.sweeping.rows import TITLES, sweep_document, sweep_rows

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from quantkit.sweeping.records import SweepResult

_STYLES = {"PASS": "bold green", "FAIL": "bold red", "ERROR": "bold red"}
_OTHER_STYLE = "bold yellow"
_TEXTS = 2
"""The first columns; those behind them hold figures."""


def sweep_reply(result: SweepResult) -> Reply:
    """What `quantkit sweep` says at its end."""
    lines: list[RenderableType] = ["", _make_table(result), ""]
    for model, sentence in result.choices.items():
        lines.append(f"model    {model}: {sentence}")
    for outcome in result.outcomes:
        if outcome.error is not None:
            lines.append(f"error    {outcome.job.name}: {outcome.error}")
            lines.append(f"log      {outcome.job.log}")
    lines += [f"compare  {page}" for page in result.reports.values()]
    if result.reports:
        lines.append(f"reports  {result.output_root / '*' / 'report' / 'report.html'}")
    lines.append(f"table    {result.output_root / 'sweep.md'}")
    return Reply(sweep_document(result), lines, result.exit_code)


def _make_table(result: SweepResult) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(TITLES):
        if number < _TEXTS:
            table.add_column(title, overflow="fold")
        else:
            table.add_column(title, justify="right", no_wrap=True)
    for row in sweep_rows(result):
        name, verdict, *figures = map(printable, row.cells)
        style = _STYLES.get(row.verdict, _OTHER_STYLE)
        table.add_row(Text(name, style="bold"), Text(verdict, style=style), *figures)
    return table
