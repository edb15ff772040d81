"""A plan, or why there is none, as Markdown: the comment on a pull request."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from quantkit.errors import PlanError, QuantkitError
from quantkit.ggml_types import GGUF
from quantkit.recipe import ExportSpec
from quantkit.records import EncoderPlan, Plan
from quantkit.report.markdown import MOST_CHARACTERS
from quantkit.report.rounding import format_bytes, format_count, format_ratio
from quantkit.report.tables import table
from quantkit.report.text import code_span, escape_markdown
from quantkit.schemes import ONNX

Rows = Iterable[tuple[str, str]]

_LONGEST_LINE = 2_000
"""Characters of one note or problem; what strangers wrote may be quoted in it."""
_LONGEST_NAME = 200
_SPARE = 2_000
"""Room for the last line, below the longest comment that there can be."""


@dataclass(frozen=True)
class SizeRow:
    """One line of the table of sizes. `bound`: the size is the largest that it can come to."""

    name: str
    size_bytes: int
    bound: bool = False


def name_plan(asked: Sequence[str]) -> str:
    """Return the first line of a plan's page: invisible, and the same whenever the same is asked.

    A comment that begins with it is replaced by the next one rather than joined by it.
    """
    digest = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    return f"<!-- quantkit plan {digest[:16]} -->"


def size_rows(plan: Plan | EncoderPlan, exports: Sequence[ExportSpec]) -> Iterator[SizeRow]:
    """Yield the checkpoint's size and that of each artifact, in the order of the recipe."""
    yield SizeRow("checkpoint", plan.baseline_bytes)
    if isinstance(plan, EncoderPlan):
        yield SizeRow(f"{ONNX} {plan.precision}", plan.artifact_bytes)
        return
    for export in exports:
        if export.format not in (GGUF, ONNX):
            yield SizeRow(str(export.format), plan.artifact_bytes, plan.choice is not None)
    for file in plan.gguf:
        yield SizeRow(f"{GGUF} {file.type}", file.tensor_bytes, bool(file.candidates))
    for graph in plan.onnx:
        yield SizeRow(f"{ONNX} {graph.precision}", graph.tensor_bytes)


def render_plan(
    plan: Plan | EncoderPlan,
    *,
    mark: str,
    recipe: str,
    sizes: Iterable[SizeRow],
    facts: Rows,
    notes: Iterable[str],
) -> str:
    """Return a plan as Markdown of at most 65,536 characters, what GitHub takes for a comment.

    Args:
        plan: the plan; its sizes are counted against its weights.
        mark: the page's first line, of `name_plan`.
        recipe: what the user called it: a file, or the name of a shipped one.
        sizes: the checkpoint first.
        facts: a name and a text each: layers, time, memory, disk.
        notes: what the user should know.
    """
    rows = list(sizes)
    parts = [
        mark,
        f"## ✅ Plan: {_title(recipe, plan.model)}",
        "**No problem found.** Nothing is quantized yet: the sizes follow from the headers, time "
        "and memory are predicted for the machine that made this plan.",
        _size_table(rows, plan.parameters),
        table(["", ""], [[f"**{escape_markdown(name)}**", _line(text)] for name, text in facts]),
    ]
    listed = list(dict.fromkeys(notes))
    if listed:
        parts.append(f"### {format_count(len(listed), 'note')}")
    return _join(parts, listed, "notes")


def render_refusal(error: QuantkitError, *, mark: str, recipe: str, model: str | None) -> str:
    """Return why there is no plan as Markdown: every problem, as far as a comment has room.

    `model` is what the command named, None where it is left to the recipe.
    """
    problems = list(error.problems) if isinstance(error, PlanError) else _lines_of(error)
    count = format_count(len(problems), "problem")
    parts = [
        mark,
        f"## ❌ Plan: {_title(recipe, model)}",
        f"**{count} found before any work**, so that the job would not start (exit code "
        f"{error.exit_code}).",
    ]
    return _join(parts, problems, "problems")


def _lines_of(error: QuantkitError) -> list[str]:
    """The lines of a message; a headline above a list says nothing that the page does not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return listed if listed and lines[0].endswith(":") else lines


def _title(recipe: str, model: str | None) -> str:
    on = "" if model is None else f" on {code_span(model[:_LONGEST_NAME])}"
    return code_span(recipe[:_LONGEST_NAME]) + on


def _size_table(rows: Sequence[SizeRow], parameters: int) -> str:
    baseline = rows[0].size_bytes
    cells = []
    for row in rows:
        most = "at most " if row.bound else ""
        bits = 8 * row.size_bytes / parameters if parameters else 0.0
        ratio = "" if row is rows[0] else format_ratio(row.size_bytes, baseline)
        size = f"{most}{format_bytes(row.size_bytes)}"
        cells.append([escape_markdown(row.name), size, f"{most}{bits:.2f}", ratio])
    return table(["Artifact", "Size", "Bits per weight", "Against the checkpoint"], cells)


def _line(text: str) -> str:
    cut = text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"
    return escape_markdown(cut)


def _join(parts: Sequence[str], lines: Sequence[str], noun: str) -> str:
    """Join the parts, and below them the lines that there is room for."""
    text = "\n\n".join(parts)
    items = [f"- {_line(line)}" for line in lines]
    kept: list[str] = []
    left = MOST_CHARACTERS - _SPARE - len(text)
    for item in items:
        left -= len(item) + 1
        if left < 0:
            kept.append(f"- {len(items) - len(kept):,} more {noun}: `quantkit plan` lists all")
            break
        kept.append(item)
    return "\n\n".join([text, *(["\n".join(kept)] if kept else [])]) + "\n"
