"""The promises to users: the exported names, and flags that are named like parameters."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import quantkit
from quantkit import errors
from quantkit.cli.main import app

PACKAGE = Path(quantkit.__file__).parent

FLAG_OF_PARAMETER = {
    "overrides": "--set",
    "gate": "--no-gate",
    "statistics": "--stats",
    "pre_tokenizer": "--pre-tokenizer",
}
"""Parameters whose flag has another name."""

TELEMETRY = {"--mlflow", "--mlflow-model", "--mlflow-upload", "--otel"}
"""In Python these are calls of their own: docs/tracking.md."""
PAGES = {"--markdown"}
"""A page of what the function returns."""
COMMAND_LINE_ONLY = {"--json", "--quiet", "--help", *PAGES, *TELEMETRY}
PROGRAM_ONLY = {"progress", "tokenizer", "calibration", "checks", "solvers"}

FUNCTIONS = ("bisect", "calibrate", "convert", "gate", "inspect", "plan", "quantize", "verify")


def type_checking_names() -> set[str]:
    """The names that a type checker sees in quantkit/__init__.py."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    branch = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {
        alias.asname or alias.name
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def command(name: str) -> Any:
    """A subcommand as the parser has it."""
    return get_command(app).commands[name]


def flags_of(name: str) -> set[str]:
    """The long flags of a command."""
    options = command(name).params
    flags = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    return {flag for flag in flags if flag.startswith("--")}


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters by name."""
    return dict(inspect.signature(function).parameters)


def test_all_is_sorted_and_complete() -> None:
    """`__all__` is what type checkers see, plus the version."""
    assert quantkit.__all__ == sorted(quantkit.__all__)
    assert set(quantkit.__all__) == type_checking_names() | {"__version__"}
    assert dir(quantkit) == quantkit.__all__


def test_every_exported_name_is_there() -> None:
    """Each lazy name loads and is what its home calls it."""
    for name in quantkit.__all__:
        value = getattr(quantkit, name)
        assert name in {"__version__", "recipe_schema"} or value.__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As for any module."""
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        quantkit.quantise  # noqa: B018


def test_every_error_is_exported() -> None:
    """Whoever calls the API can catch each error by its public name."""
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.QuantkitError)
    }
    assert classes <= set(quantkit.__all__)


def test_no_module_has_the_name_of_an_exported_function() -> None:
    """Importing `quantkit.gate` as a module would put it in the place of the function."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(quantkit.__all__)


def test_the_version_is_a_version() -> None:
    """The build reads it from the source."""
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(a|b|rc|dev)\d+)?", quantkit.__version__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_flags_are_the_parameters_of_the_function(name: str) -> None:
    """A flag without a parameter, or a parameter without a flag, is a mistake."""
    parameters = parameters_of(getattr(quantkit, name))
    arguments = {
        option.name for option in command(name).params if option.param_type_name == "argument"
    }
    expected = {
        FLAG_OF_PARAMETER.get(parameter, f"--{parameter}")
        for parameter in parameters
        if parameter not in PROGRAM_ONLY and parameter not in arguments
    }
    assert flags_of(name) - COMMAND_LINE_ONLY == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defaults_live_in_the_function_alone(name: str) -> None:
    """A command has no default of its own that could drift away from the API's."""
    for option in command(name).params:
        assert option.default in (None, False), option.name
        if f"--{option.name}" not in COMMAND_LINE_ONLY and option.name != "help":
            assert option.default is None, option.name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_but_the_first_parameter_are_given_by_name(name: str) -> None:
    """So that parameters can be added without breaking a caller."""
    first, *rest = parameters_of(getattr(quantkit, name)).values()
    assert first.default is inspect.Parameter.empty
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in rest)


def every_command() -> list[tuple[str, Any]]:
    """Commands by name, those of groups behind their group, which takes no options itself."""
    found = []
    for name, shown in get_command(app).commands.items():
        # What a shell asks for completions is for nobody else.
        if shown.hidden:
            continue
        found += [(name, shown), *getattr(shown, "commands", {}).items()]
    return found


def test_every_command_has_json_and_quiet() -> None:
    """A script passes both without knowing which command talks much."""
    for name, shown in every_command():
        if not hasattr(shown, "commands"):
            flags = {flag for option in shown.params for flag in option.opts}
            assert {"--json", "--quiet"} <= flags, name


def test_every_command_shows_an_example() -> None:
    """`--help` ends with a line that can be tried."""
    for name, shown in every_command():
        assert re.match(r"Example: (source <\()?quantkit ", shown.epilog or ""), name
