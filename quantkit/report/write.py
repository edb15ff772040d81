"""All reports of a job, each file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from quantkit.durable import write_words
from quantkit.errors import writing
from quantkit.records import Report
from quantkit.report.document import render_json
from quantkit.report.html import render_html
from quantkit.report.junit import render_junit
from quantkit.report.markdown import render_markdown


def write_reports(report: Report, folder: Path) -> dict[str, Path]:
    """Write the report in every form into `folder`, which is made if absent.

    All are rendered before the first is written. Returns file name -> path, for `report.json`,
    `report.md`, `report.html` and `junit.xml`.

    Raises:
        ResourceError, OutputError: a file cannot be written.
    """
    texts = render_reports(report)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in texts}
    for name, text in texts.items():
        write_words(paths[name], text)
    return paths


def render_reports(report: Report) -> dict[str, str]:
    """Return file name -> text of the report in every form."""
    return {
        "report.json": render_json(report),
        "report.md": render_markdown(report),
        "report.html": render_html(report),
        "junit.xml": render_junit(report),
    }
