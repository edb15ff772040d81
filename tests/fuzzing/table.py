"""The table of what came of all cases, in docs/security.md.

python -m tests.fuzzing.table
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
"""What `make fuzz` found last, a reader an entry."""
PAGE = Path(__file__).parents[2] / "docs" / "security.md"
_BEGIN, _END = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"


def store(path: Path, reader: str, summary: Mapping[str, object]) -> None:
    """Put one reader's numbers into a file of them, in which several processes may write."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        found = json.loads(path.read_bytes()) if path.exists() else {}
        found[reader] = dict(summary)
        beside = path.with_name(f"{path.name}.new")
        beside.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", "utf-8")
        beside.replace(path)
    finally:
        os.close(folder)


def compose_table(results: Mapping[str, Mapping[str, object]]) -> str:
    """Return the Markdown of the table, a reader a line."""
    titles = ("reader", "cases", "read", "refused", "crashes", "hangs", "over 500 MB")
    lines = [f"| {' | '.join((*titles, 'slowest case', 'most memory'))} |", "|---" * 9 + "|"]
    for reader, found in results.items():
        lines.append(
            f"| {reader} | {found['cases']:,} | {found['accepted']:,} | {found['refused']:,} "
            f"| {found['crashes']} | {found['hangs']} | {found['over_memory']} "
            f"| {found['slowest_seconds']:.2f} s (case {found['slowest_case']}) "
            f"| {found['peak_growth_mb']:.0f} MB |"
        )
    return "\n".join(lines)


def main() -> int:
    """Write the table into the page; 1 where the page has no place for it."""
    results = json.loads(RESULTS.read_bytes())
    text = PAGE.read_text("utf-8") if PAGE.exists() else ""
    if _BEGIN not in text or _END not in text:
        print(f"{PAGE} has no place for the table: write {_BEGIN} and {_END} in it")
        return 1
    head, _, rest = text.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    PAGE.write_text(f"{head}{_BEGIN}\n{compose_table(results)}\n{_END}{tail}", "utf-8")
    print(f"{PAGE}: {len(results)} readers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
