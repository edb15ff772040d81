"""report.md: short enough for a pull request, with the long parts folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from quantkit.records import ArtifactReport, Report, Verdict
from quantkit.report.advice import all_reasons, suggestions, verdict_sentence
from quantkit.report.allocation import allocation_table
from quantkit.report.evidence import evidence_sections, recipe_changes, recipe_text
from quantkit.report.kv import KV_TITLES, kv_rows
from quantkit.report.layers import layer_rows, worst_layers
from quantkit.report.rows import (
    check_rows,
    headline_cells,
    headline_rows,
    name_samples,
    speed_rows,
)
from quantkit.report.text import code_block, code_span, escape_markdown

_SIGNS: Mapping[Verdict, str] = MappingProxyType(
    {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️", "UNJUDGED": "⬜"}
)

MOST_LAYERS = 300
"""Rows of the per-layer table; with more, the comment box of a pull request overflows."""


def render_markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown."""
    parts = [
        f"## {_SIGNS[report.verdict]} {report.verdict}: {code_span(report.model)}, quantized",
        f"**{report.verdict}.** {escape_markdown(verdict_sentence(report))}",
        *_reasons(report),
        *_advice(report),
        headline_table(report),
        *(_checks(artifact, len(report.artifacts) > 1) for artifact in report.artifacts),
        _speed(report),
        *_layers(report),
        *_allocation(report),
        *_kv_cache(report),
        *_notes(report),
        *_evidence(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline_table(report: Report) -> str:
    """Return the headline table as Markdown; the verdict in bold."""
    cells = headline_cells(headline_rows(report))
    if not cells:
        return ""
    rows = [[_cell(title, text) for title, text in row.items()] for row in cells]
    return table([escape_markdown(title) for title in cells[0]], rows)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are Markdown already."""
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(title: str, text: str) -> str:
    if title == "Artifact":
        return code_span(text, in_table=True)
    return f"**{text}**" if title == "Verdict" else escape_markdown(text)


def _reasons(report: Report) -> list[str]:
    reasons = all_reasons(report)
    return ["\n".join(f"- {escape_markdown(reason)}" for reason in reasons)] if reasons else []


def _advice(report: Report) -> list[str]:
    found = suggestions(report)
    if not found:
        return []
    parts = ["### What to try"]
    for suggestion in found:
        parts.append(escape_markdown(suggestion.why))
        if suggestion.setting:
            parts.append(code_block(suggestion.setting))
    return parts


def _checks(artifact: ArtifactReport, several: bool) -> str:
    rows = check_rows(artifact.judgement)
    if not rows:
        return ""
    confidence = f"{100 * artifact.judgement.confidence:.4g}%"
    title = f"### Checks of {code_span(artifact.name)}" if several else "### Checks"
    measured = (
        f"Measured in {escape_markdown(artifact.runtime)} on {artifact.judgement.windows} "
        f"{name_samples(artifact)}, {confidence} intervals."
    )
    cells = [
        [
            escape_markdown(row.label),
            escape_markdown(row.limit),
            escape_markdown(row.value),
            escape_markdown(row.interval),
            f"**{row.verdict}**",
        ]
        for row in rows
    ]
    checks = table(["Check", "Limit", "Value", f"{confidence} interval", "Verdict"], cells)
    return f"{title}\n\n{measured}\n\n{checks}"


def _speed(report: Report) -> str:
    rows = [
        [
            code_span(row.artifact, in_table=True),
            *(escape_markdown(text) for text in (row.what, row.figure, row.ratio, row.where)),
        ]
        for row in speed_rows(report)
    ]
    titles = ["Artifact", "Timed", "In float → artifact", "Ratio", "In"]
    return f"### Speed\n\n{table(titles, rows)}" if rows else ""


def _layers(report: Report) -> list[str]:
    if not report.layers:
        return []
    cut = len(report.layers) > MOST_LAYERS
    chosen = worst_layers(report.layers, MOST_LAYERS) if cut else report.layers
    rows = [
        [
            code_span(row.name, in_table=True),
            escape_markdown(row.scheme),
            row.bits,
            escape_markdown(row.method),
            row.error,
            row.against_rounding,
            row.weight_error,
            row.damping,
            row.scaling,
            escape_markdown(row.fallback),
        ]
        for row in layer_rows(chosen)
    ]
    titles = ["Layer", "Scheme", "Bits", "Method", "Output error", "Against rounding"]
    titles += ["Weight error", "Damping", "Scaling", "Fallback"]
    fallbacks = sum(bool(layer.fallback) for layer in report.layers)
    summary = f"{len(report.layers)} layers"
    if fallbacks:
        summary += f", {fallbacks} with a fallback"
    if cut:
        summary += f" (the {MOST_LAYERS} with the largest error; report.html has all)"
    return [_fold(summary, table(titles, rows))]


def _allocation(report: Report) -> list[str]:
    found = allocation_table(report)
    if found is None:
        return []
    cut = len(found.rows) > MOST_LAYERS
    rows = [
        [
            code_span(row.name, in_table=True),
            escape_markdown(row.chosen),
            row.size,
            *row.costs,
            escape_markdown(row.why),
        ]
        for row in found.rows[:MOST_LAYERS]
    ]
    titles = ["Layers", "Chosen", "Size", *(f"KL with {name}" for name in found.schemes), "Why"]
    summary = f"{len(found.rows)} choices"
    if cut:
        summary += f" (the first {MOST_LAYERS}; report.html has all)"
    sentences = " ".join(escape_markdown(sentence) for sentence in found.sentences)
    return [
        f"### Why each layer has its {found.noun}\n\n{sentences}",
        _fold(summary, table(titles, rows)),
    ]


def _kv_cache(report: Report) -> list[str]:
    if not report.kv_cache:
        return []
    rows = [
        [
            code_span(row.name, in_table=True),
            row.key_scale,
            row.key_absmax,
            row.value_scale,
            row.value_absmax,
        ]
        for row in kv_rows(report.kv_cache)
    ]
    return [_fold(f"KV cache of {len(rows)} attention layers", table(KV_TITLES, rows))]


def _notes(report: Report) -> list[str]:
    if not report.notes:
        return []
    notes = "\n".join(f"- {escape_markdown(note)}" for note in report.notes)
    return [f"### Notes\n\n{notes}"]


def _evidence(report: Report) -> list[str]:
    parts = []
    recipe = recipe_text(report.evidence)
    if recipe is not None:
        body = code_block(recipe, "yaml")
        changes = recipe_changes(report.evidence)
        if changes:
            body += "\n\nChanged on the command line:\n\n" + code_block("\n".join(changes))
        parts.append(_fold("Recipe", body))
    sections = evidence_sections(report.evidence)
    if sections:
        tables = [
            f"**{escape_markdown(section.title)}**\n\n"
            + table(
                ["", ""],
                [
                    [escape_markdown(name), code_span(text, in_table=True)]
                    for name, text in section.rows
                ],
            )
            for section in sections
        ]
        parts.append(_fold("Evidence", "\n\n".join(tables)))
    return parts


def _fold(summary: str, body: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"
