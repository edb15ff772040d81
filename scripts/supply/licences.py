"""Check the licence of every installed package against licences.toml.

    licences.py [FOLDER...]   of this environment, and of packages set up beside it in FOLDERs

A package's licence is its SPDX expression, else its field License, else its classifiers. One that
is unknown or not allowed ends the check with 1, until licences.toml has it with a reason.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from pins import canonical

TABLE = Path(__file__).with_name("licences.toml")
_LICENCE = "License :: "
_TOKEN = re.compile(r"\s*(\(|\)|AND\b|OR\b|[^\s()]+(?:\s+WITH\s+[^\s()]+)?)")
_LONGEST_NAME = 60
"""Characters: a longer field is the text of a licence, and not its name."""


@dataclass(frozen=True)
class Rules:
    """licences.toml."""

    allowed: frozenset[str]
    spelled: Mapping[str, str]
    reviewed: Mapping[str, Mapping[str, str]]


def main(folders: list[str]) -> int:
    """Print what is wrong, and how much was looked at."""
    rules = read_rules()
    found = list(distributions())
    for folder in folders:
        if Path(folder).is_dir():
            found += distributions(path=[folder])
        else:
            print(f"licences: NOT CHECKED: {folder} is not set up", file=sys.stderr)
    faults = check_licences(found, rules)
    for fault in faults:
        print(f"licences: {fault}", file=sys.stderr)
    names = {canonical(package.metadata["Name"]) for package in found}
    if not faults:
        print(f"licences: {len(names)} packages, {len(rules.reviewed)} of them by review")
    return 1 if faults else 0


def read_rules(path: Path = TABLE) -> Rules:
    """Return the rules."""
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return Rules(frozenset(table["allowed"]), table["spelled"], table["reviewed"])


def check_licences(packages: Iterable[Distribution], rules: Rules) -> list[str]:
    """Return a line for each package whose licence is not known to be allowed."""
    faults, needed = [], set()
    for package in packages:
        name = canonical(package.metadata["Name"])
        said = licence_of(package, rules)
        if said is not None and is_allowed(said, rules.allowed):
            continue
        needed.add(name)
        if name not in rules.reviewed:
            faults.append(
                f"{name} {package.version}: {said or 'its metadata names no licence'}: review it, "
                f"and add it to {TABLE.name} with a reason, or do without it"
            )
    faults += [
        f"{name} is in {TABLE.name} and needs no review: take it out"
        for name in sorted(set(rules.reviewed) - needed)
    ]
    return sorted(set(faults))


def licence_of(package: Distribution, rules: Rules) -> str | None:
    """Return a package's licence as an SPDX expression; None where its metadata has none."""
    metadata = package.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    lines = metadata["License"].strip().splitlines() if "License" in metadata else []
    if lines and lines[0].strip() in rules.spelled:
        return rules.spelled[lines[0].strip()]
    if len(lines) == 1 and len(lines[0]) <= _LONGEST_NAME:
        return lines[0].strip()
    classifiers = metadata.get_all("Classifier") or []
    names = [line.split(" :: ")[-1] for line in classifiers if line.startswith(_LICENCE)]
    return " AND ".join(rules.spelled.get(name, name) for name in names) or None


def is_allowed(expression: str, allowed: frozenset[str]) -> bool:
    """Whether all that an SPDX expression asks for is allowed; one side of an OR suffices."""
    tokens = _TOKEN.findall(expression)
    try:
        answer, rest = _any_of(tokens, allowed)
    except IndexError:
        return False
    return answer and not rest


def _any_of(tokens: list[str], allowed: frozenset[str]) -> tuple[bool, list[str]]:
    answer, rest = _all_of(tokens, allowed)
    while rest and rest[0] == "OR":
        other, rest = _all_of(rest[1:], allowed)
        answer = answer or other
    return answer, rest


def _all_of(tokens: list[str], allowed: frozenset[str]) -> tuple[bool, list[str]]:
    answer, rest = _one(tokens, allowed)
    while rest and rest[0] == "AND":
        other, rest = _one(rest[1:], allowed)
        answer = answer and other
    return answer, rest


def _one(tokens: list[str], allowed: frozenset[str]) -> tuple[bool, list[str]]:
    if tokens[0] == "(":
        answer, rest = _any_of(tokens[1:], allowed)
        return answer and rest[0] == ")", rest[1:]
    return " ".join(tokens[0].split()) in allowed, tokens[1:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
