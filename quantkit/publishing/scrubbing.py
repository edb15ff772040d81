"""What concerns nobody but the machine it was on: local paths are taken out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_HOMES = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s'\"]+|/root(?=[/\s'\"]|$)")
_PATH_IN_RECIPE = re.compile(r"(?<![^\s:'\"{\[,=])(?:~?/|[A-Za-z]:[\\/])[^\s'\",}\]]+")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def find_local_paths(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the absolute paths that a document names as its own, the longest first.

    These are what the recipe and the evidence have as model, data and output, and the folders that
    this process works in.

    Args:
        document: quantkit.json or report.json.
        folder: the output.
    """
    found = {path for path in _walk(document) if _is_local(path)}
    found |= {str(folder.absolute()), str(folder.resolve()), str(Path.cwd())}
    return sorted((path for path in found if len(path) > 1), key=len, reverse=True)


def hide_local_paths(value: Any, paths: Iterable[str]) -> Any:
    """Return a JSON document in which of each local path the last name alone is left.

    Home folders that were not among `paths` become `~`.
    """
    known = list(paths)
    if isinstance(value, str):
        return _hide_in_text(value, known)
    if isinstance(value, dict):
        return {key: hide_local_paths(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_local_paths(item, known) for item in value]
    return value


def _hide_in_text(text: str, paths: Iterable[str]) -> str:
    if "/" not in text and "\\" not in text:
        return text
    for path in paths:
        if path in text:
            last = re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "."
            # A whole path: /app is neither in `owner/app` nor in https://host/app.
            text = last.join(re.split(rf"(?<![\w.-]){re.escape(path)}(?![\w.-])", text))
    return _HOMES.sub("~", text)


def _is_local(text: str) -> bool:
    """Whether a text is one absolute path, with at least one folder above it."""
    if len(text) > 4096 or "\n" in text:
        return False
    absolute = text.startswith("/") or bool(_DRIVE.match(text)) or text.startswith("~/")
    return absolute and len(re.split(r"[/\\]", text.rstrip("/\\"))) > 2


_OF_PATHS = frozenset(
    {"model", "output", "name", "source", "data", "prompts", "path", "python", "store", "tasks"}
)
"""Keys below which the evidence may have a path; texts of models lie below others."""


def _walk(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            # The keys of gate.python are runtimes, and each value is a path.
            yield from _walk(item, key if key == "python" else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, key)
    elif isinstance(value, str):
        if key == "overrides":
            value = value.partition("=")[2]
        elif key == "text":
            yield from _paths_of_recipe(value)
            return
        elif key not in _OF_PATHS:
            return
        yield os.fspath(value)


def _paths_of_recipe(text: str) -> Iterator[str]:
    """Return the values of a recipe's lines that may be paths."""
    yield from _PATH_IN_RECIPE.findall(text)
