"""A recipe's file -> plain data with line numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import RecipeError, nearest, unreadable
from quantkit.plain_yaml import MAX_YAML_BYTES, parse_yaml

MAX_RECIPE_BYTES = MAX_YAML_BYTES

KeyPath = tuple[str | int, ...]
"""Keys and list indexes from the top of a recipe down to a value."""

Place = int | str
"""What gave a value: a line of the file, or the `KEY=VALUE` that was set upon it."""


def shipped_folder() -> Path:
    """Folder of the recipes that come with quantkit."""
    package = Path(__file__).parent.parent
    installed = package / "shipped" / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> tuple[Path, ...]:
    """Paths of the shipped recipes, by name."""
    return tuple(sorted(shipped_folder().glob("*.yaml")))


def find_recipe(recipe: str | os.PathLike[str]) -> Path:
    """Return the path of a recipe file or of a shipped recipe named `awq4` or `awq4.yaml`.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = {candidate.stem: candidate for candidate in shipped_recipes()}
    name = path.name.removesuffix(".yaml").removesuffix(".yml")
    if path.parent == Path() and name in shipped:
        return shipped[name]
    raise RecipeError(
        f"no recipe {os.fspath(recipe)!r}: neither a file nor a shipped recipe"
        f"{nearest(name, shipped)} (shipped: {', '.join(shipped)})"
    )


_REMEDIES = (
    ("'\\t' that cannot start any token", "; indent with blanks: YAML takes no tabs"),
    ("could not find expected ':'", "; a key has a colon and a blank behind it"),
    ("mapping values are not allowed here", "; is a blank missing or a line indented too far?"),
)
"""What PyYAML says of usual mistakes, and what is to be done."""


def read_recipe_text(path: Path) -> str:
    """Return the text of a recipe file of at most `MAX_RECIPE_BYTES`.

    Raises:
        RecipeError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path} is larger than a recipe can be (256 KiB)")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(f"the recipe {path}", error, RecipeError) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {path} is not UTF-8 text") from error


def parse_recipe(text: str, path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Return the YAML mapping of `text` and the line of every key and item in it."""
    try:
        tree, node = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        remedy = next((words for piece, words in _REMEDIES if piece in str(error.problem)), "")
        raise RecipeError(f"{path}{mark}: not valid YAML: {error.problem}{remedy}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, not {type(tree).__name__}")
    lines: dict[KeyPath, int] = {}
    for where, line in _walk_lines(node, ()):
        if where in lines:
            raise RecipeError(f"{path}:{line}: key {where[-1]!r} is given twice")
        lines[where] = line
    return tree, lines


def _walk_lines(node: yaml.Node | None, prefix: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = (*prefix, str(key.value))
            yield where, key.start_mark.line + 1
            yield from _walk_lines(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*prefix, index), item.start_mark.line + 1
            yield from _walk_lines(item, (*prefix, index))
