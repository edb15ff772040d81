"""Bars: at any width, resized, suspended, interrupted, on a terminal that is closed."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.terminal.screen import Session, Typist, draw

JOB = """
import os, sys, time
from quantkit.cli import main as program
from quantkit.cli.console import Reply, show_progress
from quantkit.records import Event

STEPS = {steps}

def work(arguments):
    with show_progress(False) as progress:
        try:
            for step, event in enumerate(STEPS):
                progress(Event(*event))
                if event[3].startswith("wait"):
                    while not os.path.exists({go!r}):
                        time.sleep(0.01)
            print("a library says hello", file=sys.stderr)
        finally:
            if {lingers}:
                progress(Event("tidy", 0, 1, "tidying"))
                while not os.path.exists({go!r}):
                    time.sleep(0.01)
    return Reply({{}}, ["the work is done"])

program._run = work
sys.exit(program.main(["quantize", "--recipe", "x"]))
"""
"""A job of steps that are not work; at one it waits until a file is there."""

STEPS = [
    ("prepare", 0, 1, ""),
    ("prepare", 1, 1, ""),
    ("quantize", 11, 128, "model.layers.10, output error 0.12%"),
    ("quantize", 12, 128, "wait"),
    ("quantize", 128, 128, "model.layers.127, output error 0.12%"),
]
LAST = "model.layers.127, output error 0.12%"


class Job:
    """The words that start such a job, and the file that lets it go on."""

    def __init__(self, folder: Path, *, lingers: bool = False) -> None:
        """Say where its files are, and whether it waits once more when it is interrupted."""
        self.folder = folder
        self.code = JOB.format(steps=STEPS, go=str(folder / "go"), lingers=lingers)

    def go_on(self) -> None:
        """Let it go on."""
        (self.folder / "go").touch()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job that waits at its twelfth block."""
    return Job(tmp_path)


def wait_for_step(session: Session) -> None:
    """Wait until the bar stands where the job waits."""
    session.wait_for("12/128")


@pytest.mark.parametrize(
    ("width", "bar"), [(60, None), (90, "━" * 15), (200, "━" * 30)], ids=["60", "90", "200"]
)
def test_bars_fit_and_names_are_whole(
    typist: Typist, job: Job, width: int, bar: str | None
) -> None:
    """Where there is no room, the bar goes before anything else does."""
    job.go_on()
    with typist.open(code=job.code, width=width) as session:
        shown = session.end()

    assert shown.code == 0
    assert shown.is_harmless
    (row,) = [row for row in shown.rows if row.startswith("quantize")]
    assert row.endswith(LAST)
    assert "128/128" in row
    assert len(row) < width
    assert ("━" in row) == (bar is not None)
    assert bar is None or f" {bar} " in row
    assert shown.rows[-1] == "the work is done"
    assert "a library says hello" in shown.rows


def test_without_unicode_and_colours_bars_are_ascii(typist: Typist, job: Job) -> None:
    """`NO_COLOR`, and an encoding that has no lines."""
    job.go_on()
    with typist.open(
        code=job.code, width=100, changes={"NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    ) as session:
        shown = session.end()

    assert shown.sent.isascii()
    assert "\x1b[3" not in shown.sent
    assert "=" * 30 in shown.text


@pytest.mark.parametrize("terminal", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    typist: Typist, job: Job, terminal: str
) -> None:
    """As a pipe does: no escape codes at all."""
    job.go_on()
    with typist.open(code=job.code, changes={"TERM": terminal}) as session:
        shown = session.end()

    assert "\x1b" not in shown.sent
    assert shown.rows[:3] == [
        "prepare 0/1",
        "prepare 1/1",
        "quantize 11/128  model.layers.10, output error 0.12%",
    ]


@pytest.mark.parametrize("widths", [(120, 60), (60, 120)], ids=["narrower", "wider"])
def test_a_resized_terminal_gets_bars_that_fit(
    typist: Typist, job: Job, widths: tuple[int, int]
) -> None:
    """From the next time on that they are drawn."""
    before, after = widths
    with typist.open(code=job.code, width=before) as session:
        wait_for_step(session)
        session.resize(after)
        job.go_on()
        shown = session.end()

    assert shown.code == 0
    drawn = [row for row in draw(shown.sent, 200) if row.startswith("quantize")]
    assert drawn[-1].endswith(LAST)
    assert len(drawn[-1]) < after
    assert ("━" in drawn[-1]) == (after == max(widths))


def test_ctrl_z_leaves_the_terminal_to_the_shell_and_fg_begins_below(
    typist: Typist, job: Job
) -> None:
    """In a real shell: the cursor is seen meanwhile, and no line of the shell is written over."""
    shell = "import os; os.execvp('bash', ['bash', '--norc', '--noprofile', '-i'])"
    script = job.folder / "job.py"
    script.write_text(job.code)
    with typist.open(code=shell, changes={"PS1": "# "}) as session:
        session.wait_for("# ")
        session.type(shlex.join([sys.executable, str(script)]))
        wait_for_step(session)
        session.press("z")
        session.wait_for("Stopped")
        hidden, shown_again = (session.sent.rfind(f"\x1b[?25{each}") for each in "lh")
        assert hidden < shown_again < session.sent.rfind("Stopped")
        session.type("fg")
        session.wait_for("\x1b[?25l", 2)
        job.go_on()
        session.wait_for("the work is done")
        session.type("exit")
        shown = session.end()

    rows = shown.rows
    begun = next(at for at, row in enumerate(rows) if "Stopped" in row)
    assert any(row.startswith("quantize") and "12/128" in row for row in rows[:begun])
    again = next(at for at, row in enumerate(rows) if row.startswith("# fg"))
    after = [row for row in rows[again:] if row.startswith(("prepare", "quantize"))]
    assert [row.split()[0] for row in after] == ["prepare", "quantize"]
    assert after[1].endswith(LAST)
    assert shown.sent.rfind("\x1b[?25h") > shown.sent.rfind("\x1b[?25l")


def ended_by_an_interrupt(session: Session) -> None:
    """The last line says what goes on, the cursor is back, nothing is half-drawn."""
    shown = session.end()
    assert shown.code == 130
    assert "Traceback" not in shown.sent
    assert "the same command goes on: quantkit quantize --recipe x" in shown.text
    assert shown.sent.rfind("\x1b[?25h") > shown.sent.rfind("\x1b[?25l")
    (line,) = [line for line in shown.text.split("\n") if line.startswith("error: ")]
    assert "interrupted" in line


@pytest.mark.parametrize("how", ["c", signal.SIGTERM, signal.SIGHUP], ids=["C", "TERM", "HUP"])
def test_an_interrupted_job_leaves_a_tidy_terminal(
    typist: Typist, job: Job, how: str | signal.Signals
) -> None:
    """Ctrl-C, and the signals of a batch system and of a shell that ends."""
    with typist.open(code=job.code) as session:
        wait_for_step(session)
        if isinstance(how, str):
            session.press(how)
        else:
            session.signal(how)
        ended_by_an_interrupt(session)


def test_a_second_ctrl_c_ends_what_tidies_up(typist: Typist, tmp_path: Path) -> None:
    """Without a traceback, and still with the words of the first."""
    job = Job(tmp_path, lingers=True)
    with typist.open(code=job.code) as session:
        wait_for_step(session)
        session.press("c")
        session.wait_for("tidying")
        session.press("c")
        ended_by_an_interrupt(session)


def test_ctrl_c_again_and_again_is_one_interruption(typist: Typist, job: Job) -> None:
    """At whatever moment of its end the next one comes."""
    with typist.open(code=job.code) as session:
        wait_for_step(session)
        while session.ended() is None:
            session.press("c")
            time.sleep(0.001)
        shown = session.end()
    assert shown.code in (130, -signal.SIGINT)
    assert "Traceback" not in shown.sent


def test_a_terminal_that_is_closed_interrupts(typist: Typist, job: Job) -> None:
    """The kernel hangs up; nothing can be written any more, and nothing complains."""
    with typist.open(code=job.code) as session:
        wait_for_step(session)
        session.hang_up()
        shown = session.end()
    assert shown.code == 130
