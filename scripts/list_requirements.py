"""Print what pyproject.toml asks for, one requirement a line, so that pip can install it alone.

usage: list_requirements.py [EXTRA...]

Any Python from 3.11 on runs it. An extra that names others of quantkit brings what they ask for.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_OWN_EXTRAS = re.compile(r"quantkit\[([^]]*)\]")


def main(extras: list[str]) -> int:
    """Print the requirements; 2 where an extra is unknown."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    known: dict[str, list[str]] = project["optional-dependencies"]
    unknown = sorted(set(extras) - set(known))
    if unknown:
        print(f"no extra {', '.join(unknown)} (known: {', '.join(known)})", file=sys.stderr)
        return 2
    for line in [*project["dependencies"], *dict.fromkeys(_expand(known, extras))]:
        print(line)
    return 0


def _expand(known: dict[str, list[str]], extras: list[str]) -> Iterator[str]:
    for extra in extras:
        for line in known[extra]:
            own = _OWN_EXTRAS.fullmatch(line)
            if own is None:
                yield line
            else:
                yield from _expand(known, [name.strip() for name in own[1].split(",")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
