"""Tests of quantkit.functions: which code a function is, and what cannot be called."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import subprocess
import sys
from typing import Any

import pytest

from quantkit.errors import InputError
from quantkit.functions import check_function, describe_function, name_function
from tests.cli.running import ROOT


def plain(value: object) -> object:
    return value


class Called:
    """An object that can be called."""

    def __call__(self, value: object) -> object:
        return value

    def method(self, value: object) -> object:
        return value


@functools.wraps(plain)
def decorated(*arguments: Any) -> Any:
    return plain(*arguments)


def typed(source: str) -> Any:
    """A function whose source no file has."""
    names: dict[str, Any] = {"__name__": "typed"}
    exec(source, names)
    return names["own"]


@pytest.mark.parametrize(
    ("function", "name", "source"),
    [
        (plain, "plain", plain),
        (functools.partial(functools.partial(plain)), "plain", plain),
        (decorated, "plain", plain),
        (Called(), "Called", Called),
        (Called().method, "Called.method", Called.method),
    ],
)
def test_a_function_is_known_by_its_name_and_its_source(
    function: Any, name: str, source: Any
) -> None:
    """Whatever is around it."""
    found = describe_function(function)
    assert found.name == f"{__name__}.{name}"
    assert found.sha256 == hashlib.sha256(inspect.getsource(source).encode()).hexdigest()
    assert name_function(function) == name.rpartition(".")[2]


def make(bound: object) -> Any:
    """A function that knows `bound`, and one that knows itself."""

    def inner(value: object) -> object:
        return inner(value) if value else bound

    return inner


def test_what_is_bound_to_a_function_is_a_part_of_it() -> None:
    """A job that goes on would else go on with other numbers.

    Of what may change on the way, as a list that a solver writes to, the type alone is told.
    """
    bound = [0.9, 0.8, "a", (1, (2,)), (1, (3,)), None, [1]]
    for bind in (lambda each: functools.partial(make, bound=each), make):
        found = [describe_function(bind(each)).sha256 for each in bound]
        assert len(set(found)) == len(bound)
        assert found == [describe_function(bind(each)).sha256 for each in [*bound[:-1], [2]]]
        (name,) = {describe_function(bind(each)).name for each in bound}
        assert name.startswith(__name__)


def test_without_a_file_its_bytecode_is_compared() -> None:
    """Changed constants and names change it, comments do not; C has none."""
    lines = "def own(a):\n    return {f} if a in {{1, 2, 'x'}} else (lambda: {n})\n"
    first = describe_function(typed(lines.format(f="abs(a)", n=3)))
    again = describe_function(typed("# a comment\n" + lines.format(f="abs(a)", n=3)))
    others = [lines.format(f="abs(a)", n=4), lines.format(f="len(a)", n=3)]

    assert first.sha256 == again.sha256
    assert first.name == "typed.own"
    assert all(describe_function(typed(other)).sha256 != first.sha256 for other in others)
    assert describe_function(math.sqrt).sha256 is None


def test_the_hash_of_bytecode_is_the_same_in_every_process() -> None:
    """Sets of texts have another order in each."""
    program = (
        "from quantkit.functions import describe_function\n"
        "names = {'__name__': 'x'}\n"
        "exec(\"def own(a):\\n    return a in {'one', 'two', 'three', 'four'}\", names)\n"
        "print(describe_function(names['own']).sha256)\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(found) == 1


def generates(value: object) -> Any:
    yield value


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "it is a int and no function: do so"),
        (lambda: 1, r"it <lambda>\(\) cannot be called with 1 argument \(too many"),
        (lambda a, b: 1, r"missing a required argument: 'b'"),
        (generates, "it generates answers only later: do so"),
    ],
)
def test_what_cannot_be_called_so_is_refused(function: Any, message: str) -> None:
    """With the remedy."""
    with pytest.raises(InputError, match=message):
        check_function(function, "it", 1, "do so")


@pytest.mark.parametrize("function", [plain, Called(), Called().method, decorated, abs, print])
def test_what_can_be_called_passes(function: Any) -> None:
    """Also what is written in C."""
    check_function(function, "it", 1, "do so")
