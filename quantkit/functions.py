"""Functions that a user passes as arguments: can they be called, and which code are they."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any

from quantkit.errors import InputError


@dataclass(frozen=True)
class FunctionSource:
    """Which code a function is.

    sha256: of its own source text, or of its bytecode where that cannot be read (a function that
    was typed into an interpreter, for instance), and of the numbers and texts that a `partial` or a
    closure has bound; None for what is not written in Python. What it calls, and what an object
    remembers, is not part of it.
    """

    name: str
    """Qualified: `my_checks.keeps_json`."""
    sha256: str | None


def name_function(function: Callable[..., Any]) -> str:
    """Return the short name of a function: of a `partial` that of what it calls, of an object with
    `__call__` that of its class."""
    inner = _unwrap(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def describe_function(function: Callable[..., Any]) -> FunctionSource:
    """Return the qualified name of a function and the hash of its source."""
    inner = _unwrap(function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    name = f"{named.__module__}.{named.__qualname__}"
    try:
        digest = hashlib.sha256(inspect.getsource(named).encode())
    except (OSError, TypeError):
        # Of an object, what its class does when it is called.
        called = vars(named).get("__call__") if isinstance(named, type) else inner
        code = getattr(called, "__code__", None)
        if not isinstance(code, CodeType):
            return FunctionSource(name, None)
        digest = hashlib.sha256("\n".join(_instructions(code)).encode())
    for value in _bound_values(function):
        digest.update(value.encode())
    return FunctionSource(name, digest.hexdigest())


def _bound_values(function: Any) -> Iterator[str]:
    """Yield what a `partial` passes, and what a closure has from the function around it."""
    while isinstance(function, functools.partial):
        yield from (f"{number}: {_tell(value)}" for number, value in enumerate(function.args))
        yield from (f"{name}: {_tell(value)}" for name, value in sorted(function.keywords.items()))
        function = function.func
    code, cells = (getattr(_unwrap(function), name, None) for name in ("__code__", "__closure__"))
    for name, cell in zip(code.co_freevars if code else (), cells or (), strict=True):
        # Empty as long as what it is for has not been assigned.
        with suppress(ValueError):
            yield f"{name}: {_tell(cell.cell_contents)}"


def _tell(value: object) -> str:
    """Write down numbers, texts and tuples of them; of what may change only its type."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_tell, value))})"
    return type(value).__qualname__


def check_function(function: object, what: str, arguments: int, remedy: str) -> None:
    """Refuse what cannot be called with so many positional arguments, or answers only later.

    Args:
        what: begins the message, for instance `checks[0]`.
        remedy: ends it: how such a function is written.

    Raises:
        InputError: it cannot.
    """
    if not callable(function):
        raise InputError(f"{what} is a {type(function).__name__} and no function: {remedy}")
    called = _unwrap(function)
    if any(
        test(called)
        for test in (
            inspect.iscoroutinefunction,
            inspect.isgeneratorfunction,
            inspect.isasyncgenfunction,
        )
    ):
        raise InputError(f"{what} {name_function(function)} answers only later: {remedy}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Some functions in C do not say; what is wrong shows when they are called.
        return
    try:
        signature.bind(*[None] * arguments)
    except TypeError as error:
        raise InputError(
            f"{what} {name_function(function)}{signature} cannot be called with "
            f"{arguments} argument{'s' if arguments != 1 else ''} ({error}): {remedy}"
        ) from None


def _unwrap(function: Any) -> Any:
    """What a `partial`, a method or a decorator stands for."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


def _instructions(code: CodeType) -> Iterator[str]:
    """Yield what decides what bytecode does, without the places of its lines."""
    yield code.co_code.hex()
    yield " ".join((*code.co_names, *code.co_varnames, *code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        elif isinstance(constant, frozenset):
            # Its order is another one in every process.
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)
