"""What a sweep came to, in a file: a summary of each command that was broken."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.sweep import TROUBLES, Outcome, Whole

RESULTS = Path(__file__).with_name("results.json")
_SHOWN = 20
"""Outcomes with problems that are kept whole."""


def summarize(whole: Whole, points: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what the table needs.

    Args:
        points: calls times troubles that there are; a sample breaks fewer.
    """
    troubles = {}
    for trouble in TROUBLES:
        own = [outcome for outcome in outcomes if outcome.trouble == trouble.name]
        troubles[trouble.name] = {
            "points": len(own),
            "ended": dict(sorted(Counter(str(outcome.status) for outcome in own).items())),
            "problems": sum(bool(outcome.problems) for outcome in own),
        }
    wrong = [outcome for outcome in outcomes if outcome.problems]
    return {
        "calls": whole.count_kinds(),
        "points": points,
        "broken": len(outcomes),
        "troubles": troubles,
        "problems": [
            f"{each.trouble} at call {each.number} ({each.kind} {each.path}): "
            f"{'; '.join(each.problems)}"
            for each in wrong[:_SHOWN]
        ],
    }


def store(name: str, summary: dict[str, Any]) -> None:
    """Put a command's summary into the file, in place of an earlier one."""
    with RESULTS.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        found = json.loads(file.read() or "{}")
        found[name] = summary
        file.truncate(0)
        file.write(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
