"""Help and errors of every command, as a user sees them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.core import TyperArgument
from typer.main import get_command

from quantkit.cli.main import app
from tests.cli.running import run_here
from tests.terminal.screen import show_here


def list_commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every command that a user can call, with the words that call it."""
    found = [(path, command)]
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            found += list_commands(inner, (*path, name))
    return found


PROGRAM = get_command(app)
COMMANDS = list_commands(PROGRAM)
EACH = pytest.mark.parametrize(
    ("words", "command"), [pytest.param(*each, id=" ".join(each[0]) or "-") for each in COMMANDS]
)


@pytest.fixture(autouse=True)
def _parser_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer to make than a command line takes to be parsed."""
    monkeypatch.setattr("quantkit.cli.main.get_command", lambda _: PROGRAM)


def list_names(command: Any) -> list[str]:
    """The names that a command's help has to tell."""
    names = list(getattr(command, "commands", {}))
    for parameter in command.params:
        if isinstance(parameter, TyperArgument):
            names.append(str(parameter.metavar))
        else:
            names += filter(None, map(str.strip, (*parameter.opts, *parameter.secondary_opts)))
    return [name for name in names if not name.startswith("__")]


@EACH
@pytest.mark.parametrize("width", [60, 200])
def test_help_fits_and_names_all(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], command: Any, width: int
) -> None:
    """No name is cut, no line is too long but the example, which can be copied and parses."""
    shown = show_here(monkeypatch, *words, "--help", width=width)

    assert shown.code == 0
    assert shown.is_harmless
    assert "…" not in shown.text
    assert "<" not in shown.text.replace("<(", "")
    *lines, example = shown.text.rstrip("\n").split("\n")
    assert max(map(len, lines)) <= min(width, 100)
    assert example.startswith(
        f"Example: {'source <(' if words[:1] == ('completion',) else ''}quant"
    )
    told = "\n".join(lines)
    assert all(name in told for name in list_names(command))


@EACH
def test_help_in_a_pipe_has_no_codes_and_a_line_a_row(words: tuple[str, ...], command: Any) -> None:
    """stderr is empty; with `--json` it is a document."""
    done = run_here(*words, "--help")

    assert done.returncode == 0
    assert done.stderr == ""
    assert all(each.isprintable() or each == "\n" for each in done.stdout)
    assert "Example: " in done.stdout


@EACH
def test_a_misspelt_option_is_one_line_with_the_nearest_name(
    words: tuple[str, ...], command: Any
) -> None:
    """Also as the one document of `--json`, where the command has it."""
    names = [name for name in list_names(command) if name.startswith("--")]
    if not names:
        names = ["--help"]
    wrong = names[0][:-2] + names[0][-1] + names[0][-2]
    done = run_here(*words, wrong)

    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"did you mean {names[0]!r}?" in line
    if "--json" in names:
        done = run_here(*words, "--json", wrong)
        assert json.loads(done.stdout) == {"error": line.removeprefix("error: "), "exit_code": 2}


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["qantize"], "quantize"),
        (["recipes", "chekc"], "check"),
        (["runtimes", "instal"], "install"),
        (["recipes", "check", "awq5"], "awq4"),
        (["recipes", "check", "awq4", "--set", "quantize.methd=rtn"], "method"),
        (["recipes", "check", "awq4", "--set", "quantize.method=gtpq"], "gptq"),
        (["recipes", "check", "awq4", "--set", "quantize.scheme=w4a61"], "w4a16"),
        (["completion", "bsh"], "bash"),
        (["runtimes", "install", "vlm"], "vllm"),
        (["convert", "x", "--to", "gguf:Q4_KM", "--output", "y"], "Q4_K_M"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(arguments: list[str], nearest: str) -> None:
    """In one line, with exit code 2."""
    done = run_here(*arguments)

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert nearest in line.partition("mean")[2], line
