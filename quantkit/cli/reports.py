"""The last lines of a job: headline table, verdict, size, where the report is, how to serve."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.cli.console import Reply
from quantkit.cli.layout import Cell, Line, Sentence, Table, make_table
from quantkit.cli.published import list_publication_lines, publication_document
from quantkit.ggml_types import GGUF
from quantkit.records import EXIT_CODES, Artifact, ArtifactReport, Report, Result, Verdict
from quantkit.report.advice import all_reasons, verdict_sentence
from quantkit.report.allocation import allocation_line, name_choice
from quantkit.report.custom import custom_rows, custom_sentence
from quantkit.report.document import report_document
from quantkit.report.footprints import (
    footprint_notes,
    footprint_rows,
    footprint_sentence,
    order_sentence,
)
from quantkit.report.predicted import PREDICTED_TITLES, predicted_rows
from quantkit.report.probes import (
    count_judged,
    probe_rows,
    task_rows,
    task_sentence,
    unsettled_probes,
)
from quantkit.report.rounding import format_bytes, format_ratio
from quantkit.report.rows import (
    SpeedRow,
    headline_cells,
    headline_figures,
    headline_rows,
    speed_rows,
)
from quantkit.report.snippets import decoder_command, encoder_command
from quantkit.schemes import MODELOPT, ONNX

_STYLES: dict[Verdict, str] = {
    "PASS": "bold green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "bold yellow",
    "UNJUDGED": "bold yellow",
}

GENAI_CONFIG = "genai_config.json"
"""File of a decoder's ONNX artifact, which ONNX Runtime GenAI loads it by."""

_MOST_COLUMNS = 2
"""More artifacts than these are not told apart side by side in 80 columns."""
_PERPLEXITY = "Perplexity"
_LEFT_OUT = ("Bits/weight",)
"""Of the table with an artifact a row, for lack of room."""


def quantize_reply(result: Result) -> Reply:
    """What `quantkit quantize` says about a finished job."""
    page = result.output / "report" / "report.html"
    serve = None if result.verdict == "FAIL" else _serve_command(result.artifacts)
    document = {
        "output": str(result.output),
        "report": str(page),
        "serve": serve,
        **_document(result.report, result.exit_code),
    }
    lines = _lines(result.report, page, serve)
    if result.publication is not None:
        document["publication"] = publication_document(result.publication)
        lines += list_publication_lines(result.publication)
    return Reply(document, lines, result.exit_code)


def gate_reply(report: Report, folder: Path) -> Reply:
    """What `quantkit gate` says about an artifact; `folder` holds the reports."""
    page, exit_code = folder / "report.html", EXIT_CODES[report.verdict]
    document = {"report": str(page), **_document(report, exit_code)}
    return Reply(document, _lines(report, page, None), exit_code)


def _document(report: Report, exit_code: int) -> dict[str, Any]:
    whole = report_document(report)
    shown = ("model", "verdict", "baseline", "artifacts", "differences", "notes")
    return {"exit_code": exit_code, **{key: whole[key] for key in shown}}


def _lines(report: Report, page: Path, serve: str | None) -> list[Line]:
    mark = Cell(report.verdict, _STYLES[report.verdict])
    verdict = Sentence("verdict  ", verdict_sentence(report), mark)
    lines: list[Line] = ["", _table(report), "", verdict]
    lines += [_say("", reason) for reason in all_reasons(report)]
    lines += [line for artifact in report.artifacts for line in _measured(report, artifact)]
    if report.differences and order_sentence(report):
        lines.append(_say("order", order_sentence(report)))
    lines += _running(report)
    lines += [_say("note", note) for note in report.notes]
    chosen = allocation_line(report)
    if report.allocation is not None and chosen is not None:
        lines.append(_say(f"{name_choice(report.allocation)}s", chosen))
    if not report.comparison:
        lines += [_say("size", _size(report, size)) for size in _sizes(report)]
    lines += [_say("speed", _speed(report, row)) for row in speed_rows(report)]
    lines += _predicted(report)
    lines.append(f"report   {page}")
    if serve is not None:
        lines.append(f"serve    {serve}")
    return lines


def _say(label: str, words: str) -> Sentence:
    return Sentence(f"{label:<8} ", words)


def _table(report: Report) -> Table:
    """The headline table: an artifact a column; of many a row each, without the intervals."""
    rows = headline_rows(report)
    if len(rows) <= _MOST_COLUMNS:
        cells = headline_cells(rows)
        return make_table(
            [title, *(row[title] for row in cells)] for title in (cells[0] if cells else ())
        )
    figures = [
        [figure for figure in found if figure.title not in _LEFT_OUT]
        for found in headline_figures(rows)
    ]
    lines = [["Artifact", *(figure.title for figure in figures[0]), "Verdict"]]
    for row, found in zip(rows, figures, strict=True):
        values = [row.perplexity_increase if f.title == _PERPLEXITY else f.value for f in found]
        lines.append([row.name, *values, row.verdict])
    return make_table(lines, has_titles=True)


def _measured(report: Report, artifact: ArtifactReport) -> list[Line]:
    """Lines on tasks, custom checks and probes; what failed probes found is among the reasons."""
    several = f"{artifact.name}: " if len(report.artifacts) > 1 else ""
    lines: list[Line] = []
    for task in task_rows(artifact):
        verdict = f"; {task.verdict}" if task.is_judged else ""
        lines.append(_say("task", f"{several}{task_sentence(task)}{verdict}"))
    lines += [
        _say("check", f"{several}{custom_sentence(own)}; {own.verdict}")
        for own in custom_rows(artifact)
    ]
    probes, unsettled = probe_rows(artifact), unsettled_probes(artifact)
    judged = count_judged(probes)
    if judged:
        words = [f"{judged - len(unsettled)} of {judged} within their limits"]
        words += [f"{r.verdict}: {r.label} {r.value}, {r.limit}" for r in unsettled if r.has_value]
        unseen = [row.label for row in unsettled if not row.has_value]
        words += [f"not looked at: {', '.join(unseen)}"] if unseen else []
        lines.append(_say("probes", f"{several}{'; '.join(words)}"))
    return lines


def _running(report: Report) -> list[Line]:
    """Lines on what running takes, and once on what was timed."""
    rows = footprint_rows(report)
    lines: list[Line] = [_say("runs", f"{row.artifact}: {footprint_sentence(row)}") for row in rows]
    return lines + [_say("timed", note) for note in footprint_notes(rows)]


def _predicted(report: Report) -> list[Line]:
    """A small table of what the plan foretold beside what the job took."""
    rows = [[row.what, row.predicted, row.measured] for row in predicted_rows(report)]
    if not rows:
        return []
    titles = [title.lower() for title in PREDICTED_TITLES]
    return ["", make_table([titles, *rows], has_titles=True), ""]


def _speed(report: Report, row: SpeedRow) -> str:
    several = f"{row.artifact}: " if len(report.artifacts) > 1 else ""
    return f"{several}{row.what}: {row.figure} ({row.ratio}); {row.where}"


def _sizes(report: Report) -> Sequence[int]:
    return [artifact.size_bytes for artifact in report.artifacts]


def _size(report: Report, size: int) -> str:
    ratio = format_ratio(size, report.baseline_bytes)
    return f"{format_bytes(size)}; the original has {format_bytes(report.baseline_bytes)}: {ratio}"


def _serve_command(artifacts: Sequence[Artifact]) -> str | None:
    """The command that serves the first artifact."""
    for artifact in artifacts:
        if artifact.format == "compressed-tensors":
            return shlex.join(["vllm", "serve", str(artifact.folder)])
        if artifact.format == MODELOPT:
            return shlex.join(["trtllm-serve", str(artifact.folder)])
        if artifact.format == GGUF:
            return shlex.join(["llama-server", "-m", str(artifact.path)])
        if artifact.format == ONNX:
            is_decoder = GENAI_CONFIG in artifact.files
            command = decoder_command if is_decoder else encoder_command
            return command(artifact.folder.as_posix())
    return None
