"""`quantkit baselines`: what is kept of the baselines' answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quantkit.cli.console import Reply
from quantkit.cli.layout import Cell, make_table
from quantkit.cli.options import JsonOption, QuietOption
from quantkit.report.rounding import format_bytes, format_count

EXAMPLE = "Example: quantkit baselines --clear"


def baselines(
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything that is kept.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Show what is kept of the answers of 16-bit baselines, which gates then need not compute.

    QUANTKIT_CACHE names the folder, and QUANTKIT_CACHE_BYTES how large it may get; 0 keeps nothing.
    """
    from quantkit.judging.baseline.store import clear_store, describe_store

    found = clear_store() if clear else describe_store()
    document = {**asdict(found), "folder": str(found.folder), "cleared": clear}
    kept = f"{format_count(found.entries, 'answer')}, {format_bytes(found.bytes)}"
    rows = (
        ("folder", Cell(str(found.folder), whole=True)),
        ("removed" if clear else "kept", kept),
        ("at most", format_bytes(found.bound) if found.bound else "nothing: it is switched off"),
    )
    return Reply(document, [make_table(rows)])
