"""The table of attacks by names of files in docs/security.md: `python -m tests.security.table`."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.security.attacking import Outcome

PAGE = Path(__file__).parent.parent.parent / "docs" / "security.md"
BEGIN, END = "<!-- names: begin -->", "<!-- names: end -->"

USERS = "the user's"
_SIGNS = {"refused": "R", "harmless": "H", USERS: "U", "cannot be written": "–"}


def render_table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as tables in Markdown: carriers, and attacks by carriers."""
    carriers = list(dict.fromkeys(each.carrier for each in outcomes))
    attacks = list(dict.fromkeys(each.attack for each in outcomes))
    found = {(each.attack, each.carrier): each.found for each in outcomes}
    counts = Counter(each.found for each in outcomes)
    holes = sum(each.is_hole for each in outcomes)
    lines = [
        f"{len(attacks)} names and {len(carriers)} readers, {len(outcomes)} attacks: "
        f"{counts['refused']} refused (R), {counts['harmless']} harmless (H), "
        f"{counts[USERS]} paths of the user's own (U), "
        f"{counts['cannot be written']} that the format cannot hold (–); **{holes} holes**. "
        f"An empty cell is an attack that cannot be made: the reader chooses the name itself, or "
        f"nothing of it lies on this disk.",
        "",
        "| | who reads the name | harmless, where it is |",
        "|---|---|---|",
    ]
    lines += [
        f"| {number} | {carrier.title} | {carrier.harmless} |"
        for number, carrier in enumerate(carriers, 1)
    ]
    numbers = " | ".join(str(number) for number, _ in enumerate(carriers, 1))
    lines += ["", f"| name | {numbers} |", "|---" * (len(carriers) + 1) + "|"]
    for attack in attacks:
        cells = (found.get((attack, carrier), "") for carrier in carriers)
        marks = " | ".join(_SIGNS.get(cell, cell) for cell in cells)
        lines.append(f"| {attack.title} | {marks} |")
    return "\n".join(lines)


def replace_between(text: str, table: str) -> str:
    """Return a page with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Make all attacks and write the table."""
    import pytest

    from tests.hub import HubServer
    from tests.security.attacking import attack_all
    from tests.security.carriers import CARRIERS
    from tests.security.hub_carriers import make_hub_carriers

    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with (
        tempfile.TemporaryDirectory() as place,
        HubServer() as hub,
        pytest.MonkeyPatch.context() as patch,
    ):
        outcomes = attack_all(Path(place), (*CARRIERS, *make_hub_carriers(hub, patch)))
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_between(text, render_table(outcomes)), encoding="utf-8")
    print(f"{len(outcomes)} attacks, {sum(each.is_hole for each in outcomes)} holes")


if __name__ == "__main__":
    main()
