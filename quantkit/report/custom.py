"""The checks of the user's own, rounded for people."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.records import ArtifactReport, CustomCheck, Report, Verdict
from quantkit.report.rounding import ABSENT, count_digits, format_significant
from quantkit.report.tables import table
from quantkit.report.text import code_span, escape_markdown


@dataclass(frozen=True)
class CustomRow:
    """One check in words; a dash stands for a number that it does not have. `check` has the same
    unrounded."""

    label: str
    value: str
    limit: str
    verdict: Verdict
    detail: str
    code: str
    """Which function it is, and the beginning of the hash of its source."""
    check: CustomCheck


def custom_rows(artifact: ArtifactReport) -> tuple[CustomRow, ...]:
    """Return one row a check, in the order in which they were given."""
    return tuple(map(_row, artifact.judgement.custom_checks))


def custom_sentence(row: CustomRow) -> str:
    """Return a check as one line, its verdict left out: `keeps_json 0.9, limit 0.8: 9 of 10`."""
    value = "" if row.value == ABSENT else f" {row.value}"
    limit = "" if row.limit == ABSENT else f", limit {row.limit}"
    return f"{row.label}{value}{limit}{f': {row.detail}' if row.detail else ''}"


def custom_part(report: Report) -> str:
    """Return the checks of all artifacts as a part of a page in Markdown; empty without any."""
    several = len(report.artifacts) > 1
    cells = [
        [
            *([code_span(artifact.name, in_table=True)] if several else []),
            *(escape_markdown(text) for text in (row.label, row.value, row.limit)),
            f"**{row.verdict}**",
            escape_markdown(row.detail),
            code_span(row.code, in_table=True),
        ]
        for artifact in report.artifacts
        for row in custom_rows(artifact)
    ]
    titles = [*(["Artifact"] if several else []), "Check", "Value", "Limit", "Verdict", "Found"]
    return f"### Custom checks\n\n{table([*titles, 'Function'], cells)}" if cells else ""


def _row(check: CustomCheck) -> CustomRow:
    digits = 3
    if check.value is not None and check.limit is not None:
        digits = count_digits(check.value, check.limit)
    value, limit = (
        ABSENT if number is None else format_significant(number, digits)
        for number in (check.value, check.limit)
    )
    code = check.function if check.sha256 is None else f"{check.function} {check.sha256[:12]}"
    return CustomRow(check.name, value, limit, check.verdict, check.detail, code, check)
