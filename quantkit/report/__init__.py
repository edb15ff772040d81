"""One `Report` record in every form: JSON, Markdown, HTML, JUnit, model card, table rows."""

from quantkit.report.document import report_document
from quantkit.report.model_card import render_model_card, write_model_card
from quantkit.report.rows import HeadlineRow, headline_cells, headline_rows
from quantkit.report.schema import document_schema
from quantkit.report.write import write_reports

__all__ = [
    "HeadlineRow",
    "document_schema",
    "headline_cells",
    "headline_rows",
    "render_model_card",
    "report_document",
    "write_model_card",
    "write_reports",
]
