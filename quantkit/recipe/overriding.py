"""`--set` and the API's `overrides`: single keys of a recipe that are given beside its file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from quantkit.errors import RecipeError
from quantkit.plain_yaml import parse_yaml
from quantkit.recipe.reading import KeyPath, Place

Overrides = Sequence[str] | Mapping[str, Any]
"""`KEY=VALUE` pairs, or keys with their values."""

_EXAMPLE = "quantize.group_size=64"

_RUNTIME_KEYS = "gate.python."
"""What follows is the name of a runtime, which may have a dot of its own: llama.cpp."""


def read_overrides(overrides: Overrides) -> tuple[str, ...]:
    """Return `KEY=VALUE` pairs.

    Raises:
        RecipeError: it is something else.
    """
    if isinstance(overrides, Mapping):
        return tuple(f"{key}={_write(key, value)}" for key, value in overrides.items())
    if isinstance(overrides, str):
        raise RecipeError(
            f"overrides is a list of KEY=VALUE, got one string: write overrides=[{overrides!r}]"
        )
    pairs = tuple(overrides)
    for pair in pairs:
        if not isinstance(pair, str):
            raise RecipeError(
                f"overrides is a list of KEY=VALUE, and {pair!r:.60} is none: "
                f"write for instance {_EXAMPLE!r}"
            )
    return pairs


def _write(key: object, value: object) -> str:
    """A value as YAML, of which JSON is a part."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        raise RecipeError(
            f"overrides: the value of {key!r:.60} is of type {type(value).__name__}: "
            f"numbers, text, lists and mappings can be set"
        ) from None


def apply_overrides(
    tree: dict[str, Any], pairs: Sequence[str], lines: Mapping[KeyPath, int] | None = None
) -> dict[KeyPath, Place]:
    """Set each `KEY=VALUE` in `tree`, and return what has given the values that are now there.

    Args:
        lines: of the file that `tree` was read from.

    Raises:
        RecipeError: one is no such pair, or there is no place for its key.
    """
    places: dict[KeyPath, Place] = dict(lines or {})
    for pair in pairs:
        key = _apply(tree, pair, places)
        for replaced in [each for each in places if each[: len(key)] == key]:
            del places[replaced]
        places[key] = pair
    return places


def _apply(tree: dict[str, Any], pair: str, places: dict[KeyPath, Place]) -> KeyPath:
    """Set one pair, note the groups that it makes, and return where its value is."""
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {pair!r}: expected KEY=VALUE, for instance {_EXAMPLE}")
    try:
        value, _ = parse_yaml(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {pair!r}: the value is not valid YAML") from None
    *parents, last = _split_key(key)
    node: Any = tree
    path: KeyPath = ()
    for name in parents:
        part = _find_part(node, name, pair)
        path = (*path, part)
        if not isinstance(node, list) and node.get(part) is None:
            node[part] = {}
            places[path] = pair
        node = node[part]
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {pair!r}: {name!r} is a value, not a group of keys")
    part = _find_part(node, last, pair)
    node[part] = value
    return (*path, part)


def _split_key(key: str) -> list[str]:
    if not key.startswith(_RUNTIME_KEYS):
        return key.split(".")
    return [*_RUNTIME_KEYS.rstrip(".").split("."), key.removeprefix(_RUNTIME_KEYS)]


def _find_part(node: dict[str, Any] | list[Any], name: str, pair: str) -> str | int:
    """The key of a group, or the index of a list."""
    if not isinstance(node, list):
        return name
    if name.isdigit() and int(name) < len(node):
        return int(name)
    raise RecipeError(f"--set {pair!r}: {name!r} is not an index of a list of {len(node)}")
