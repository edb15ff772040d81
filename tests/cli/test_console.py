"""What reaches the terminal, tested through real processes, pipes and a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys

import pytest

from quantkit.cli.console import Reply, render_json, render_lines, render_reply
from quantkit.cli.layout import make_table
from quantkit.errors import printable
from tests.cli.running import COMMAND, environment, run

STEPS = """
from quantkit.cli.console import show_progress
from quantkit.records import Event
with show_progress({quiet}) as progress:
    for done in range(3):
        if progress:
            progress(Event("quantize", done + 1, 3, f"model.layers.{{done}}, output error 0.12%"))
    for done in range(500):
        if progress:
            progress(Event("gate", done + 1, 500, f"KL {{done / 10000}}"))
"""


def on_a_terminal(command: list[str], **changes: str) -> str:
    """Run `command` with a terminal as stdin, stdout and stderr; return all that it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm-256color", COLUMNS="120", **changes),
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0
    return shown.decode()


# --- progress


def test_without_a_terminal_there_is_one_line_a_block_on_stderr() -> None:
    """And not one for each of 500 silent steps."""
    code = STEPS.format(quiet=False)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "quantize 1/3  model.layers.0, output error 0.12%",
        "quantize 2/3  model.layers.1, output error 0.12%",
        "quantize 3/3  model.layers.2, output error 0.12%",
        "gate 500/500  KL 0.0499",
    ]


def test_quiet_shows_no_progress() -> None:
    """Neither lines nor bars."""
    code = STEPS.format(quiet=True)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.stdout == done.stderr == ""


def test_on_a_terminal_there_are_bars() -> None:
    """With the block, its error and how far it is."""
    shown = on_a_terminal([sys.executable, "-c", STEPS.format(quiet=False)])
    assert "━" in shown
    assert "3/3" in shown
    assert "500/500" in shown
    assert "model.layers.2, output error 0.12%" in shown


# --- colours and pipes


def test_colours_are_for_terminals_that_want_them() -> None:
    """`NO_COLOR` and pipes get plain text."""
    command = [sys.executable, "-m", "quantkit", "recipes", "--help"]
    assert "\x1b[" in on_a_terminal(command)
    plain = on_a_terminal(command, NO_COLOR="1")
    assert "\x1b[3" not in plain
    assert "\x1b[" not in run("recipes", "--help").stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`quantkit recipes schema | head -1` says nothing about pipes and keeps its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit", "recipes", "schema"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["recipes", "schema"], ["recipes", "list", "--json"]])
def test_a_reply_that_finds_no_space_is_one_line(arguments: list[str]) -> None:
    """`> file` on a full disk is a lack of disk, not a defect."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no space left")


def test_text_that_the_terminal_cannot_encode_is_escaped() -> None:
    """An ASCII terminal gets escapes, not a traceback."""
    done = run("recipes", "check", "für-alle", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "f\\xfcr-alle" in done.stderr
    assert "Traceback" not in done.stderr


def test_control_characters_of_strangers_do_not_reach_the_terminal() -> None:
    """A tensor name may hold anything, an escape sequence too."""
    assert printable("a\x1b[2Jb\tc\nd") == "a\\x1b[2Jb\\tc\nd"
    done = run("recipes", "check", "x\x1b[31m")
    assert "\x1b" not in done.stderr


# --- replies


def test_json_is_one_document_that_any_parser_reads() -> None:
    """NaN is no JSON."""
    assert json.loads(render_json({"name": "für"})) == {"name": "für"}
    with pytest.raises(ValueError, match="JSON"):
        render_json({"value": float("nan")})


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_strangers_wrote_reaches_the_terminal_as_a_command(terminal: bool) -> None:
    """Neither in a line nor in a table, and rich's own markup is no markup there."""
    evil = "x\x1b[2J\u202e[red]y[/red]"
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]

    text = render_lines([evil, make_table([(evil, evil)])], stream)

    assert text.count("x\\x1b[2J\\u202e[red]y[/red]") == 3
    assert "\x1b[2J" not in text
    assert "\u202e" not in text


def test_long_lines_are_not_wrapped_in_a_pipe() -> None:
    """A path is copied whole."""
    table = make_table([("report", "x" * 300)])
    text = render_lines(["y" * 300, table, "[bold]not markup[/]"], io.StringIO())
    assert "y" * 300 in text
    assert "x" * 300 in text
    assert "[bold]not markup[/]" in text


def test_a_reply_is_printed_for_people_or_for_programs() -> None:
    """The same reply, either way."""
    reply = Reply({"answer": 42}, ["the answer is 42"])
    stdout = io.StringIO()
    assert render_reply(reply, as_json=False, stdout=stdout) == "the answer is 42\n"
    assert json.loads(render_reply(reply, as_json=True, stdout=stdout)) == {"answer": 42}


# --- the parser


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quantise"], "'quantize'"),
        (["recipes", "shwo", "x"], "'show'"),
        (["quantize", "--recpe", "x"], "did you mean '--recipe'?"),
        (["quantize"], "missing option '--recipe'"),
        (["gate", "x"], "missing option '--baseline'"),
        (["recipes"], "missing command"),
        (["inspect"], "missing argument 'ARTIFACT'"),
        (["quantize", "a", "--model", "b", "--recipe", "x"], "the model is given twice"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_nearest_name(
    arguments: list[str], expected: str
) -> None:
    """Exit code 2, and where to read more."""
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_a_wrong_command_line_answers_in_json_too() -> None:
    """A program that asked for JSON gets JSON, whatever happens."""
    done = run("quantize", "--json")
    assert json.loads(done.stdout)["exit_code"] == done.returncode == 2
    assert "--recipe" in json.loads(done.stdout)["error"]


def test_version_and_help_exit_with_zero() -> None:
    """On stdout, without loading torch: quickly."""
    import quantkit as package

    assert run("--version").stdout == f"quantkit {package.__version__}\n"
    for arguments in ([], ["--help"], ["recipes", "--help"]):
        done = run(*arguments)
        assert done.returncode == 0
        assert "Example: quantkit" in done.stdout
        assert done.stderr == ""
