"""Streams that are closed, full, in another encoding, or not read to their end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.cli import main as program
from quantkit.cli.console import Reply
from tests.cli.running import COMMAND, environment
from tests.terminal.screen import show_here

NEEDS_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def in_a_shell(line: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `Q` is the program."""
    program = f'Q() {{ {shlex.join(COMMAND)} "$@"; }}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}; {line}"],
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=300,
    )


@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        ("Q recipes schema | head -1", 0, "{\n", ""),
        ("Q --help | head -1", 0, "Usage: quantkit [OPTIONS] COMMAND ...\n", ""),
        ("Q recipes list <&- >&- 2>&-", 0, "", ""),
        pytest.param("Q recipes list >&-", 0, "", "", marks=pytest.mark.soak),
        pytest.param("Q recipes lst 2>&-", 2, "", "", marks=pytest.mark.soak),
        pytest.param("Q recipes lst 2>/dev/full", 2, "", "", marks=[NEEDS_FULL, pytest.mark.soak]),
    ],
)
def test_nobody_reads(line: str, code: int, out: str, err: str) -> None:
    """Nothing is said about it: the exit code is that of the work."""
    done = in_a_shell(line)

    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@NEEDS_FULL
@pytest.mark.parametrize(
    "words",
    [
        "--help",
        pytest.param("--version", marks=pytest.mark.soak),
        pytest.param("recipes show awq4", marks=pytest.mark.soak),
    ],
)
def test_stdout_that_is_full_is_one_line_and_no_success(words: str) -> None:
    """Whatever is printed."""
    done = in_a_shell(f"Q {words} > /dev/full")

    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no space left for stdout: ")


def test_a_closed_stream_leaves_no_place_for_a_file(tmp_path: Path) -> None:
    """Else the next file that is opened would be stdout, and get what libraries print."""
    code = (
        "import os, sys; from quantkit.cli.entry import open_standard_streams;"
        "open_standard_streams();"
        "print(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), file=sys.stderr)"
    )
    words = shlex.join([sys.executable, "-c", code, str(tmp_path / "file")])
    done = in_a_shell(f"{words} <&- >&-")

    assert int(done.stderr) > 2
    assert (tmp_path / "file").read_bytes() == b""


# --- encodings

REPLY = Reply({"name": "für 模型 😀"}, ["361.7 → 354.7 (2.72× smaller) ≤ für …"])


def test_an_encoding_without_our_signs_gets_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs are spelled out, letters of names are escaped."""
    monkeypatch.setattr(program, "_run", lambda _: REPLY)

    shown = show_here(monkeypatch, "plan", encoding="ascii")

    assert shown.text == "361.7 -> 354.7 (2.72x smaller) <= f\\xfcr ...\n"


def test_json_is_json_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's escapes are none of JSON's."""
    monkeypatch.setattr(program, "_run", lambda _: REPLY)

    for encoding in ("ascii", "latin-1", "utf-8"):
        shown = show_here(monkeypatch, "plan", "--json", encoding=encoding)
        assert json.loads(shown.text) == REPLY.document


@pytest.mark.parametrize("variable", ["LC_ALL", "LC_CTYPE", "LANG"])
def test_the_locale_c_is_ascii_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """By the user's own word; where no locale is named, as in a container, UTF-8 is fine."""
    monkeypatch.setattr(program, "_run", lambda _: REPLY)
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONUTF8", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)

    assert "→" in show_here(monkeypatch, "plan").text
    assert "→" in show_here(monkeypatch, "plan", **{variable: "C.UTF-8"}).text
    assert show_here(monkeypatch, "plan", **{variable: "C"}).text.isascii()


@pytest.mark.skipif(
    not sys.prefix.isascii(),
    reason="NOT TESTED: in the locale C Python itself cannot read the path of its environment",
)
def test_a_file_is_utf8_also_in_the_locale_c() -> None:
    """What is printed into a file is data: a recipe keeps its letters."""
    code = (
        "import sys; from quantkit.cli import main as p; from quantkit.cli.console import Reply;"
        "p._run = lambda _: Reply({}, ['für']); sys.exit(p.main(['plan']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment(LC_ALL="C")
    )

    assert (done.stdout.decode(), done.stderr.decode()) == (f"für{os.linesep}", "")
