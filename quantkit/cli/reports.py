"""The last lines of a job: headline table, verdict, size, where the report is, how to serve."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from quantkit.cli.console import Reply, make_table
from quantkit.ggml_types import GGUF
from quantkit.records import EXIT_CODES, Artifact, Report, Result, Verdict
from quantkit.report.advice import all_reasons, verdict_sentence
from quantkit.report.allocation import allocation_line, name_choice
from quantkit.report.document import report_document
from quantkit.report.rounding import format_bytes, format_ratio
from quantkit.report.rows import SpeedRow, headline_cells, headline_rows, speed_rows
from quantkit.report.snippets import decoder_command, encoder_command
from quantkit.schemes import ONNX

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES: dict[Verdict, str] = {
    "PASS": "bold green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "bold yellow",
    "UNJUDGED": "bold yellow",
}


GENAI_CONFIG = "genai_config.json"
"""File of a decoder's ONNX artifact, which ONNX Runtime GenAI loads it by."""


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
    return Reply(document, _lines(result.report, page, serve), result.exit_code)


def gate_reply(report: Report, folder: Path) -> Reply:
    """What `quantkit gate` says about an artifact; `folder` holds the reports."""
    page, exit_code = folder / "report.html", EXIT_CODES[report.verdict]
    document = {"report": str(page), **_document(report, exit_code)}
    return Reply(document, _lines(report, page, None), exit_code)


def _document(report: Report, exit_code: int) -> dict[str, Any]:
    whole = report_document(report)
    shown = ("model", "verdict", "baseline", "artifacts", "notes")
    return {"exit_code": exit_code, **{key: whole[key] for key in shown}}


def _lines(report: Report, page: Path, serve: str | None) -> list[RenderableType]:
    cells = headline_cells(headline_rows(report))
    titles = cells[0] if cells else ()
    table = make_table([title, *(artifact[title] for artifact in cells)] for title in titles)
    verdict = Text.assemble(
        "verdict  ", (report.verdict, _STYLES[report.verdict]), f"  {verdict_sentence(report)}"
    )
    lines: list[RenderableType] = ["", table, "", verdict]
    lines += [f"         {reason}" for reason in all_reasons(report)]
    lines += [f"note     {note}" for note in report.notes]
    chosen = allocation_line(report)
    if report.allocation is not None and chosen is not None:
        lines.append(f"{name_choice(report.allocation) + 's':<8} {chosen}")
    if not report.comparison:
        lines += [f"size     {_size(report, size)}" for size in _sizes(report)]
    lines += [f"speed    {_speed(report, row)}" for row in speed_rows(report)]
    lines.append(f"report   {page}")
    if serve is not None:
        lines.append(f"serve    {serve}")
    return lines


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
        if artifact.format == GGUF:
            return shlex.join(["llama-server", "-m", str(artifact.path)])
        if artifact.format == ONNX:
            is_decoder = GENAI_CONFIG in artifact.files
            command = decoder_command if is_decoder else encoder_command
            return command(artifact.folder.as_posix())
    return None
