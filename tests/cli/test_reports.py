"""The last lines of a job, for people."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from quantkit.cli.console import render_lines, render_reply
from quantkit.cli.reports import gate_reply
from quantkit.records import Report
from tests.report.hostile import make_hostile_comparison
from tests.report.measured import make_comparison, make_measured_report
from tests.report.sample import make_encoder_artifact, make_encoder_report, make_report


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def say(report: Report) -> list[str]:
    """The lines that reach a file."""
    return render_lines(gate_reply(report, Path("out")).lines, io.StringIO()).splitlines()


def test_tasks_and_probes_have_lines() -> None:
    """Each task, and of the probes how many hold and which do not."""
    lines = say(make_measured_report("FAIL"))

    (first, second) = [line for line in lines if line.startswith("task ")]
    assert first.endswith("recovers 93.1% (91.9% to 94.3%), at least 97.0%; FAIL")
    assert second.endswith("recovers 98.7% (98.2% to 99.1%)")
    (probes,) = [line for line in lines if line.startswith("probes ")]
    assert probes.endswith(
        "2 of 4 within their limits; FAIL: New loops 37.5%, at most 25.0%; "
        "not looked at: Lost JSON answers"
    )


def test_lines_of_before_are_all_that_a_report_without_measurements_has() -> None:
    """No empty line for what was not measured."""
    words = {line.split(" ")[0] for line in say(make_report())}

    assert not {"task", "probes", "order", "runs", "timed"} & words


def test_a_comparison_fits_into_a_terminal_of_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names are whole: an artifact a row, where a column each would cut them."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    lines = render_lines(gate_reply(make_comparison(), Path("out")).lines, Terminal()).splitlines()
    table = lines[1:7]

    assert " ".join(table[0].split()) == (
        "Artifact Size Perplexity KL (nats) Top-1 agreement Verdict"
    )
    assert all(len(line) <= 80 and "…" not in line for line in table)
    assert " ".join(table[2].split()) == ("demo-llama-Q4_K_M.gguf 3.78 MB +1.83% 0.0219 94.2% PASS")


def test_nothing_is_cut_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the columns have no room, an artifact is a list: its name is whole, in one line."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    table = render_lines(gate_reply(make_comparison(), Path("out")).lines[:2], Terminal())

    assert "…" not in table
    assert all(len(line) <= 60 for line in re.sub("\x1b[^m]*m", "", table).splitlines())
    assert "demo-llama-IQ3_M.gguf" in re.sub("\x1b[^m]*m", "", table).splitlines()


def test_a_comparison_says_the_order_and_what_running_takes() -> None:
    """What was timed is said once."""
    lines = say(make_comparison())

    assert len([line for line in lines if line.startswith("order ")]) == 1
    assert len([line for line in lines if line.startswith("runs ")]) == 6
    assert len([line for line in lines if line.startswith("timed ")]) == 2


def test_no_name_of_a_folder_controls_the_terminal() -> None:
    """Also in the sentence of the verdict, which names artifacts."""
    text = render_lines(gate_reply(make_hostile_comparison(), Path("out")).lines, io.StringIO())

    assert {letter for letter in text if not letter.isprintable()} == {"\n"}


def test_many_encoders_have_a_row_each() -> None:
    """With their own measures for columns."""
    report = make_encoder_report()
    artifacts = tuple(make_encoder_artifact(name=name) for name in "abc")
    lines = say(Report(**{**vars(report), "artifacts": artifacts, "comparison": True}))

    assert "Cosine" in lines[1]
    assert [line.split()[0] for line in lines[2:5]] == ["a", "b", "c"]


def test_the_document_for_programs_has_the_measurements() -> None:
    """As report.json has them."""
    reply = gate_reply(make_comparison(), Path("out"))
    document = json.loads(render_reply(reply, as_json=True, stdout=io.StringIO()))

    assert len(document["differences"]) == 10
    assert document["artifacts"][0]["tasks"][0]["lost"] == 12
