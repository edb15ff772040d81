"""Puts the tables of the last sweep into docs/reliability.md: `python -m tests.faults.table`."""

from __future__ import annotations

import json
from typing import Any

from tests.cli.running import ROOT
from tests.faults.results import RESULTS
from tests.faults.shim import KINDS
from tests.faults.sweep import TROUBLES

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def make_tables(results: dict[str, Any]) -> str:
    """Return the calls of each command, and what came of breaking them."""
    names = [trouble.name for trouble in TROUBLES]
    kinds = [kind for kind in KINDS if any(kind in each["calls"] for each in results.values())]
    calls = [
        [f"`{name}`", *(str(each["calls"].get(kind, 0)) for kind in kinds), _sum(each["calls"])]
        for name, each in results.items()
    ]
    broken = [
        [
            f"`{name}`",
            *(_share(each["troubles"][trouble]) for trouble in names),
            f"{_total(each, 'broken')} of {_total(each, 'points')}",
            _total(each, "run_again"),
            _total(each, "problems"),
        ]
        for name, each in results.items()
    ]
    return "\n".join(
        [
            "Calls of one undisturbed run, by kind (`read` opens without changing):",
            "",
            *_table(["command", *kinds, "all"], calls),
            "",
            "Calls that were broken, by trouble; how often that left what had not been left before "
            "and from which the command was run again; and how often a promise was not kept:",
            "",
            *_table(["command", *names, "all", "run again", "promises not kept"], broken),
        ]
    )


def _share(trouble: dict[str, int]) -> str:
    broken, points = trouble["broken"], trouble["points"]
    return str(points) if broken == points else f"{broken} of {points}"


def _total(command: dict[str, Any], key: str) -> str:
    return str(sum(trouble[key] for trouble in command["troubles"].values()))


def _sum(counts: dict[str, int]) -> str:
    return str(sum(counts.values()))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def run() -> None:
    """Put the tables between their marks."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = make_tables(json.loads(RESULTS.read_text()))
    PAGE.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    run()
