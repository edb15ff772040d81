"""What a sweep came to, in a file: a summary of each command that was broken."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.sweep import Outcome, Whole

RESULTS = Path(__file__).with_name("results.json")
_SHOWN = 20
"""Outcomes with problems that are kept whole."""


def summarize(
    whole: Whole, points: Mapping[str, int], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Return what the table needs.

    Args:
        points: trouble -> calls that it can happen to; a sample breaks fewer.
    """
    wrong = [outcome for outcome in outcomes if outcome.problems]
    return {
        "calls": whole.count_kinds(),
        "troubles": {
            trouble: _summarize([each for each in outcomes if each.trouble == trouble], there_are)
            for trouble, there_are in points.items()
        },
        "problems": [
            f"{each.trouble} at call {each.number} ({each.kind} {each.path}): "
            f"{'; '.join(each.problems)}"
            for each in wrong[:_SHOWN]
        ],
    }


def _summarize(outcomes: Sequence[Outcome], points: int) -> dict[str, Any]:
    return {
        "points": points,
        "broken": len(outcomes),
        "ended": dict(sorted(Counter(str(outcome.status) for outcome in outcomes).items())),
        "run_again": sum(not outcome.known for outcome in outcomes),
        "problems": sum(bool(outcome.problems) for outcome in outcomes),
    }


def store(name: str, summary: dict[str, Any]) -> None:
    """Put a command's summary into the file, in place of an earlier one of the same troubles."""
    with RESULTS.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        found = json.loads(file.read() or "{}")
        before = found.get(name, {}).get("troubles", {})
        found[name] = {**summary, "troubles": {**before, **summary["troubles"]}}
        file.truncate(0)
        file.write(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
