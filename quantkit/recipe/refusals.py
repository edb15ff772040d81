"""Why a recipe is refused, in its own words: wrong keys and values, and what is not built yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from quantkit.errors import nearest
from quantkit.recipe.exporting import ExportSpec, TypeOverride
from quantkit.recipe.judging import GateSpec, ProbesSpec, TaskSpec
from quantkit.recipe.reading import KeyPath
from quantkit.recipe.spec import (
    CalibrationSpec,
    Override,
    PublishSpec,
    QuantizeSpec,
    Recipe,
)
from quantkit.schemes import FORMATS, KV_CACHES, METHODS, RUNTIMES, SCHEMES


def locate(where: str, key: KeyPath, lines: Mapping[KeyPath, int]) -> str:
    """`file:line: dotted.key`, with the line of the nearest parent that the file has."""
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    place = f"{where}:{line}" if line else where
    names = [str(part) if str(part).isprintable() else repr(part) for part in key]
    return f"{place}: {'.'.join(names)}" if names else place


def explain(detail: ErrorDetails, where: str, lines: Mapping[KeyPath, int]) -> str:
    """One line for one pydantic error."""
    # What is wrong with the recipe as a whole has no place.
    parents, last = detail["loc"][:-1], detail["loc"][-1:]
    key = tuple(part for part in parents if not _is_union_tag(part))
    if detail["type"] == "extra_forbidden" or not any(map(_is_union_tag, last)):
        key = (*key, *last)
    place = locate(where, key, lines)
    if detail["type"] == "extra_forbidden":
        known = _keyslocate(key[:-1])
        return f"{place}: unknown key {key[-1]!r}{nearest(str(key[-1]), known)}"
    if detail["type"] == "missing":
        remedy = ": write `version: 1`" if key == ("version",) else ""
        return f"{place}: this key is required{remedy}"
    message = _PLAIN_WORDS.get(detail["type"], detail["msg"][:1].lower() + detail["msg"][1:])
    got = detail["input"]
    if got is None and detail["type"] in _GROUPS:
        return f"{place}: {message}: write its keys below it, indented"
    shown = "" if repr(got) in message or isinstance(got, dict | list) else f", got {got!r:.60}"
    return f"{place}: {message}{shown}"


_PLAIN_WORDS = {
    "bool_parsing": "true or false is expected",
    "bool_type": "true or false is expected",
    "dict_type": "a group of keys is expected",
    "float_parsing": "a number is expected",
    "float_type": "a number is expected",
    "int_from_float": "a whole number is expected",
    "int_parsing": "a whole number is expected",
    "int_type": "a whole number is expected",
    "mapping_type": "a group of keys is expected",
    "model_type": "a group of keys is expected",
    "string_type": "text is expected",
    "tuple_type": "a list is expected",
}
"""pydantic's error types in the words of a recipe."""

_GROUPS = frozenset({"dict_type", "mapping_type", "model_type"})
"""Those that want keys below the one that they name."""

_UNION_TAGS = frozenset(
    {"TaskSpec", "ProbesSpec", "str", "int", "literal['channel']", "literal['auto']"}
)
"""What pydantic adds to a path: the member of a union that was tried."""


def _is_union_tag(part: str | int) -> bool:
    """Whether a part of a path is no key."""
    return isinstance(part, str) and part in _UNION_TAGS


def _keyslocate(key: KeyPath) -> list[str]:
    """Known keys of the group at a path of the schema."""
    model: Any = Recipe
    children: dict[str, Any] = {
        "calibration": CalibrationSpec,
        "quantize": QuantizeSpec,
        "overrides": Override,
        "export": ExportSpec,
        "gate": GateSpec,
        "tasks": TaskSpec,
        "probes": ProbesSpec,
        "publish": PublishSpec,
    }
    for part in key:
        if model is ExportSpec and part == "overrides":
            model = TypeOverride
        else:
            model = children.get(str(part), model)
    return list(model.model_fields)


def find_unbuilt(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Key path and words for each thing that is asked for and not built."""
    quantize = recipe.quantize
    rows: list[tuple[KeyPath, str, str | None, str | None]] = [
        (("quantize",), "", quantize.scheme, quantize.method)
    ]
    rows += [
        (("quantize", "overrides", index), "", override.scheme, override.method)
        for index, override in enumerate(quantize.overrides)
    ]
    for where, _, scheme, method in rows:
        if scheme is not None and scheme in SCHEMES and not SCHEMES[scheme].built:
            yield (*where, "scheme"), f"scheme {scheme!r}"
        if method is not None and method in METHODS and not METHODS[method].built:
            yield (*where, "method"), f"method {method!r}"
    if not KV_CACHES[quantize.kv_cache]:
        yield ("quantize", "kv_cache"), f"kv_cache {quantize.kv_cache!r}"
    for index, export in enumerate(recipe.export):
        if not FORMATS[export.format]:
            yield ("export", index, "format"), f"export format {export.format!r}"
    if recipe.gate is not None:
        if not RUNTIMES[recipe.gate.runtime]:
            yield ("gate", "runtime"), f"gate runtime {recipe.gate.runtime!r}"
        unbuilt = [name for name in recipe.gate.python if not RUNTIMES[name]]
        if unbuilt:
            yield ("gate", "python", unbuilt[0]), f"gate runtime {unbuilt[0]!r}"
