"""Solvers that a caller passes by argument, made into methods that a recipe may name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from quantkit.errors import InputError
from quantkit.functions import check_function
from quantkit.recipe.exporting import AUTO
from quantkit.recipe.spec import BEST
from quantkit.schemes import METHODS, Method, Solver, Transform, add_solvers

GivenSolver = Solver | Callable[..., Any]
"""A function alone needs statistics where it has an attribute `needs_statistics` that is true."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_TAKEN = frozenset({AUTO, BEST, "none", *METHODS, *get_args(Transform)})
_REMEDY = "a solver takes (weight, statistics, form) and returns a quantkit.SolvedWeight"


def read_solvers(solvers: Mapping[str, GivenSolver]) -> Mapping[str, Method]:
    """Return all methods that a recipe may name, where `solvers` are given.

    Raises:
        InputError: a name is taken or is none, or a solver cannot be called as one.
    """
    if not isinstance(solvers, Mapping):
        raise InputError(
            f"solvers is a {type(solvers).__name__}, not a mapping of names to solvers: "
            f"write solvers={{'my_rtn': my_rtn}}"
        )
    return add_solvers({name: _read(name, solver) for name, solver in solvers.items()})


def _read(name: object, solver: object) -> Solver:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"solvers: {name!r} is no name: use letters, digits, `_`, `-` and `.`, "
            f"a letter in front"
        )
    if name in _TAKEN:
        raise InputError(f"solvers: {name!r} is the name of a method of quantkit: use another one")
    read = solver
    if not isinstance(read, Solver) and callable(read):
        read = Solver(read, needs_statistics=getattr(read, "needs_statistics", False))
    function = read.function if isinstance(read, Solver) else read
    check_function(function, f"solvers[{name!r}]", 3, _REMEDY)
    assert isinstance(read, Solver)
    if not isinstance(read.needs_statistics, bool):
        raise InputError(
            f"solvers[{name!r}]: needs_statistics is {read.needs_statistics!r}, not True or False"
        )
    return read
