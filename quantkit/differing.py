"""What two descriptions of a job differ in, in words: why an unfinished job is not gone on with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_LAYERS = ("plan", "layers")
_FIELDS = ("scheme", "group_size", "method", "effort")
"""What the description of a layer begins with; its types in GGUF files follow."""
_ENCODER_FIELDS = ("scheme", "method", "effort")
_HASH = re.compile(r"[0-9a-f]{40,64}")
_LONGEST = 40
_MOST = 4


def list_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name each key in which two descriptions differ, and how: `versions (torch 2.12 -> 2.13)`.

    Layers that differ in the same way are one difference. Of each key a few are told, and how many
    more there are.

    Args:
        found: JSON-ready, of the job that was begun.
        wanted: the same of the job that is asked for.
    """
    before, after = dict(_leaves((), found)), dict(_leaves((), wanted))
    different = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
    # Notes tell of the rest in other words: they matter where they are all.
    known = {path[0] for path in different if path[-1] != "notes"}
    changes: dict[str, dict[str, list[str]]] = {}
    for path in different:
        if path[-1] != "notes" or path[0] not in known:
            place, change = _word(path, before.get(path), after.get(path))
            changes.setdefault(path[0], {}).setdefault(change, []).append(place)
    return [f"{key}{_in_brackets(details)}" for key, details in changes.items()]


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of whatever is in the mappings; None stands for what is not there."""
    if path[:2] == _LAYERS and len(path) == 3 and isinstance(value, list):
        value = _name_fields(value)
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, inner in value.items():
        yield from _leaves((*path, key), inner)


def _name_fields(layer: list[Any]) -> dict[str, Any]:
    """The description of a layer with the names that the recipe has for its parts."""
    fields = _ENCODER_FIELDS if len(layer) == len(_ENCODER_FIELDS) else _FIELDS
    named = dict(zip(fields, layer, strict=False))
    types = layer[len(fields) :]
    return named | ({"types": " ".join(map(str, types))} if types else {})


def _word(path: tuple[str, ...], old: Any, new: Any) -> tuple[str, str]:
    """Return where a value is, of a layer its name, and in words how it has changed."""
    if path[:2] == _LAYERS and len(path) == 4:
        return path[2], f"{path[3]} {_show(old)} -> {_show(new)}"
    texts = _show(old), _show(new)
    name = " ".join(path[1:])
    if max(map(len, texts)) <= _LONGEST and not any(map(_HASH.fullmatch, texts)):
        return "", f"{name} {texts[0]} -> {texts[1]}".strip()
    name = "data" if name == "sha256" else name
    what = "changed" if old and new else "is new" if new else "is gone"
    return "", f"{name} {what}".strip()


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _in_brackets(details: Mapping[str, list[str]]) -> str:
    """Say the first changes, each with the first layer and the number of others it is found in."""
    told = []
    for change, places in list(details.items())[:_MOST]:
        others = f" and {len(places) - 1} more" if len(places) > 1 else ""
        told.append(f"{change} in {places[0]}{others}" if places[0] else change)
    if len(details) > _MOST:
        told.append(f"and {len(details) - _MOST} more")
    return f" ({', '.join(told)})"
