"""Whether what was read from a document has the types that its records announce."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_LARGEST = 1 << 63
"""Numbers beyond it are no sizes or counts, and floating-point numbers cannot hold all of them."""


def check_types(record: object) -> None:
    """Refuse a record of which a field, or a field of a record within, has another type.

    Raises:
        ValueError: the field is named.
    """
    _check(record, type(record), type(record).__name__, {})


def _check(value: Any, hint: Any, where: str, known: dict[type, Mapping[str, Any]]) -> None:
    """Check a value; `known` has the hints of the records that were met."""
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, hint):
        if hint not in known:
            known[hint] = get_type_hints(hint)
        for name, inner in known[hint].items():
            _check(getattr(value, name), inner, f"{where}.{name}", known)
    elif get_origin(hint) is tuple and isinstance(value, tuple):
        inner_hint = get_args(hint)[0]
        for each in value:
            _check(each, inner_hint, where, known)
    elif not _fits(value, hint):
        raise ValueError(f"{where} is {value!r:.60}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that is no record and no tuple has a type."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin in (types.UnionType, Union):
        return any(_is_one(value, each) for each in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and _is_number(value)
    if hint is int:
        return isinstance(value, int) and _is_number(value)
    if origin is not None:
        kind: Any = Mapping if issubclass(origin, Mapping) else origin
        return isinstance(value, kind)
    return isinstance(value, hint)


def _is_one(value: Any, hint: Any) -> bool:
    try:
        _check(value, hint, "", {})
    except ValueError:
        return False
    return True


def _is_number(value: float) -> bool:
    # A float may be infinite; an integer must fit into one.
    return not isinstance(value, bool) and (type(value) is float or abs(value) < _LARGEST)
