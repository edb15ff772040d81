"""Why a recipe is refused, in its own words: wrong keys and values, and what is not built yet."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from quantkit.errors import nearest
from quantkit.recipe.exporting import ExportSpec, TypeOverride
from quantkit.recipe.judging import GateSpec, ProbesSpec, TaskSpec
from quantkit.recipe.reading import KeyPath, Place
from quantkit.recipe.spec import (
    CalibrationSpec,
    Override,
    PublishSpec,
    QuantizeSpec,
    Recipe,
)
from quantkit.schemes import FORMATS, KV_CACHES, METHODS, RUNTIMES, SCHEMES

_LONGEST_PAIR = 100


def locate(where: str, key: KeyPath, places: Mapping[KeyPath, Place]) -> str:
    """`file:line: dotted.key`, with the line of the nearest parent that the file has.

    Where the value was set beside the file, `--set key=value` stands in its place.
    """
    near = _find_near(key, places)
    place = places.get(near)
    names = ".".join(str(part) if str(part).isprintable() else repr(part) for part in key)
    if isinstance(place, str):
        # The pair names the key already, except of a part of its value.
        return (
            _tell_pair(place) if place.startswith(f"{names}=") else f"{_tell_pair(place)}: {names}"
        )
    front = f"{where}:{place}" if place else where
    return f"{front}: {names}" if names else front


def _find_near(key: KeyPath, places: Mapping[KeyPath, Place]) -> KeyPath:
    """The key itself, or its nearest parent that has a place."""
    return next((key[:n] for n in range(len(key), 0, -1) if key[:n] in places), ())


def _tell_pair(pair: str) -> str:
    """As it is typed in a shell."""
    shown = pair if len(pair) <= _LONGEST_PAIR else f"{pair[:_LONGEST_PAIR]}..."
    return f"--set {shlex.quote(shown) if shown.isprintable() else repr(shown)}"


def explain(detail: ErrorDetails, where: str, places: Mapping[KeyPath, Place]) -> str:
    """One line for one pydantic error."""
    # What is wrong with the recipe as a whole has no place.
    parents, last = detail["loc"][:-1], detail["loc"][-1:]
    key = tuple(part for part in parents if not _is_union_tag(part))
    if detail["type"] == "extra_forbidden" or not any(map(_is_union_tag, last)):
        key = (*key, *last)
    place = locate(where, key, places)
    if detail["type"] == "extra_forbidden":
        return f"{place}: unknown key {key[-1]!r}{_suggest_key(key)}"
    if detail["type"] == "missing":
        return f"{place}: this key is required{_tell_remedy(key, places)}"
    message = _PLAIN_WORDS.get(detail["type"], detail["msg"][:1].lower() + detail["msg"][1:])
    got = detail["input"]
    if got is None and detail["type"] in _GROUPS:
        return f"{place}: {message}: write its keys below it, indented"
    shown = "" if repr(got) in message or isinstance(got, dict | list) else f", got {got!r:.60}"
    return f"{place}: {message}{shown}{_tell_pairs_below(key, places)}"


def _tell_remedy(key: KeyPath, places: Mapping[KeyPath, Place]) -> str:
    """What to do about a key that is missing."""
    if key == ("version",):
        return ": write `version: 1`"
    if isinstance(places.get(_find_near(key, places)), str):
        return f": add --set {'.'.join(map(str, key))}=..."
    return ""


def _tell_pairs_below(key: KeyPath, places: Mapping[KeyPath, Place]) -> str:
    """The pairs that have a part in what does not go together."""
    below = (pair for path, pair in places.items() if path[: len(key)] == key and path != key)
    pairs = dict.fromkeys(_tell_pair(pair) for pair in below if isinstance(pair, str))
    told = [pair for pair in pairs if not key or places.get(key) != pair]
    return f" (with {' '.join(told)})" if told else ""


def _suggest_key(key: KeyPath) -> str:
    """Where a key belongs that is known elsewhere, else the nearest one of its group."""
    name = str(key[-1])
    places = [path for path, _ in list_keys() if path.rpartition(".")[2] == name]
    if not places:
        return nearest(name, _list_known(key[:-1]))
    # For all layers rather than for some.
    places = [path for path in places if f"{FIRST}." not in path] or places
    return f"; did you mean {' or '.join(map(repr, places[:_MOST_PLACES]))}?"


_MOST_PLACES = 3

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


def _list_known(key: KeyPath) -> list[str]:
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


FIRST = ".0"
"""Of a list in a key of `--set`: the item that is there at least."""


def list_keys(group: type[BaseModel] = Recipe, front: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of a recipe as `--set` takes it, and what it means."""
    for name, field in group.model_fields.items():
        inner = _find_group(field.annotation)
        if inner is None:
            yield f"{front}{name}", field.description or ""
        else:
            first = FIRST if get_origin(field.annotation) is tuple else ""
            yield from list_keys(inner, f"{front}{name}{first}.")


def _find_group(annotation: Any) -> type[BaseModel] | None:
    """The group of keys that a field holds, also where it may be left out or there are many."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


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
