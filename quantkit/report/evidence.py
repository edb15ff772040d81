"""Evidence of any depth laid out as titled tables of short lines, and texts verbatim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from quantkit.report.rounding import ABSENT, format_bytes, format_seconds

_SHOWN_ELSEWHERE = frozenset({"allocation", "layers", "verdict", "recipe", "notes"})
_PROBES: Mapping[str, frozenset[tuple[str, ...]]] = MappingProxyType(
    {"timings": frozenset({("predicted", "probe"), ("matmul_probe",)})}
)
"""Section -> the parts of it that measure the machine, of which a comment has no use."""

_DURATIONS = "seconds"
"""Key of durations, or of a group of them."""


@dataclass(frozen=True)
class EvidenceSection:
    """One table: rows of (name, text)."""

    title: str
    rows: tuple[tuple[str, str], ...]


def evidence_sections(
    evidence: Mapping[str, Any], *, short: bool = False
) -> tuple[EvidenceSection, ...]:
    """Return the evidence as tables: one a top-level mapping, after one of the plain values.

    The recipe, the verdict and the layers have their own places in a report and are left out.

    Args:
        evidence: what was done with what.
        short: leave out how fast the machine was found to be, and rows without a value.
    """
    plain: list[tuple[str, str]] = []
    nested: list[EvidenceSection] = []
    for key, value in evidence.items():
        if key in _SHOWN_ELSEWHERE:
            continue
        if isinstance(value, Mapping) or _is_tree(value):
            left_out = _PROBES.get(key, frozenset()) if short else frozenset()
            rows = _rows(value, (), unit_of=key, left_out=left_out)
            kept = tuple(row for row in rows if not short or row[1] != ABSENT)
            if kept:
                nested.append(EvidenceSection(_words(key), kept))
        elif not short or _text(value, key) != ABSENT:
            plain.append((_words(key), _text(value, key)))
    if plain:
        nested.insert(0, EvidenceSection("General", tuple(plain)))
    return tuple(nested)


def recipe_text(evidence: Mapping[str, Any]) -> str | None:
    """Return the recipe verbatim where the evidence has its text, else as YAML; None without."""
    recipe = evidence.get("recipe")
    if isinstance(recipe, Mapping):
        text = recipe.get("text")
        if isinstance(text, str):
            return text
        return yaml.safe_dump(_yaml_ready(recipe), sort_keys=False, allow_unicode=True)
    return recipe if isinstance(recipe, str) and recipe.strip() else None


def recipe_changes(evidence: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the command line changed in the recipe: `KEY=VALUE`."""
    recipe = evidence.get("recipe")
    holder = recipe if isinstance(recipe, Mapping) and "text" in recipe else evidence
    changes = holder.get("overrides")
    return tuple(map(str, changes)) if isinstance(changes, list | tuple) else ()


def _rows(
    value: Any, path: tuple[str, ...], *, unit_of: str, left_out: frozenset[tuple[str, ...]]
) -> Iterator[tuple[str, str]]:
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value, start=1)
    for key, item in items:
        here = (*path, str(key))
        if here in left_out:
            continue
        unit = unit_of if unit_of == _DURATIONS else str(key)
        if isinstance(item, Mapping) or _is_tree(item):
            yield from _rows(item, here, unit_of=unit, left_out=left_out)
        else:
            yield " · ".join(here), _text(item, unit)


def _is_tree(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(
        isinstance(item, Mapping | list | tuple) for item in value
    )


def _text(value: Any, key: str) -> str:
    if value is None or value == "" or value == [] or value == ():
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item, key) for item in value)
    if isinstance(value, int) and key.endswith("bytes"):
        return f"{format_bytes(value)} ({value:,} bytes)"
    if isinstance(value, int | float) and (key == _DURATIONS or key.endswith("_seconds")):
        return format_seconds(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _words(key: str) -> str:
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]


def _yaml_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _yaml_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_ready(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
