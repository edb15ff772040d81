"""What was foretold beside what it took, in every form of the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quantkit.cli.console import render_lines
from quantkit.cli.reports import _predicted
from quantkit.records import Report
from quantkit.report.html import render_html
from quantkit.report.markdown import render_markdown
from quantkit.report.predicted import PredictedRow, predicted_rows
from tests.report.sample import make_encoder_report, make_report

PREDICTED = {
    "seconds": {"prepare": 1.5, "quantize": 50.0, "solve": 30.0, "write": 0.25, "gate": 0.0},
    "peak_memory_bytes": 900_000_000,
}
MEASURED = {"prepare": 1.0, "quantize": 61.7, "solve": 40.0, "write": 0.5, "gate": 0.0}


def make(predicted: Any = PREDICTED) -> Report:
    """The sample report with a prediction in its timings."""
    report = make_report()
    timings = {
        "seconds": MEASURED,
        "peak_memory_bytes": 800_000_000,
        "predicted": predicted,
    }
    return replace(report, evidence={**report.evidence, "timings": timings})


def test_rows_are_the_stages_all_of_them_and_the_memory() -> None:
    """A stage that is not foretold is left out; what solving took is not counted twice."""
    assert predicted_rows(make()) == (
        PredictedRow("prepare", "1.50 s", "1.00 s"),
        PredictedRow("quantize", "50.0 s", "1 min 2 s"),
        PredictedRow("of it solve", "30.0 s", "40.0 s"),
        PredictedRow("write", "0.250 s", "0.500 s"),
        PredictedRow("all", "51.8 s", "1 min 3 s"),
        PredictedRow("peak memory", "900 MB", "800 MB"),
    )


def test_every_form_shows_them() -> None:
    """Markdown folded, the page in a section of its own, the terminal as a small table."""
    report = make()

    assert "| quantize | 50.0 s | 1 min 2 s |" in render_markdown(report)
    page = render_html(report)
    assert 'id="predicted"' in page
    assert '<th scope="row">quantize</th><td class="number">50.0 s</td>' in page

    class Nowhere:
        def isatty(self) -> bool:
            return False

    text = render_lines(_predicted(report), Nowhere())  # type: ignore[arg-type]
    assert "quantize     50.0 s     1 min 2 s" in text


@pytest.mark.parametrize("report", [make_report(), make_encoder_report(), make(None), make("soon")])
def test_without_a_prediction_nothing_is_shown(report: Report) -> None:
    """Jobs of encoders, gates alone, reports of before."""
    assert predicted_rows(report) == ()
    assert "Predicted and measured" not in render_markdown(report)
    assert 'id="predicted"' not in render_html(report)
    assert _predicted(report) == []
