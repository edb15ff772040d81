"""report.md: short enough for a pull request, with the long parts folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.records import ArtifactReport, Report, Verdict
from quantkit.report.advice import all_reasons, suggestions, verdict_sentence
from quantkit.report.allocation import allocation_table
from quantkit.report.custom import custom_part
from quantkit.report.evidence import evidence_sections, recipe_changes, recipe_text
from quantkit.report.kv import KV_TITLES, kv_rows
from quantkit.report.layers import layer_rows, worst_layers
from quantkit.report.markdown_measured import (
    difference_part,
    footprint_part,
    generation_fold,
    metric_fold,
    parting_fold,
    place_folds,
    predicted_fold,
    probe_fold,
    probe_part,
    task_part,
)
from quantkit.report.rows import (
    check_rows,
    describe_samples,
    headline_cells,
    headline_rows,
    speed_rows,
)
from quantkit.report.tables import fold, table
from quantkit.report.text import code_block, code_span, escape_markdown

_SIGNS: Mapping[Verdict, str] = MappingProxyType(
    {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️", "UNJUDGED": "⬜"}
)

MOST_LAYERS = 300
"""Rows of the per-layer table; with more, the comment box of a pull request overflows."""

MOST_CHARACTERS = 65_536
"""GitHub takes no longer comment."""


@dataclass(frozen=True)
class _Part:
    """A piece of the report. name: what is said where it is left out. rank: 0 is left out last."""

    text: str
    name: str = ""
    rank: int = 0


def render_markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown, short enough for a comment.

    Where all of it would be longer than `MOST_CHARACTERS`, what matters least is left out, and the
    last line says what.
    """
    several = len(report.artifacts) > 1
    parts = [
        _Part(
            f"## {_SIGNS[report.verdict]} {report.verdict}: {code_span(report.model)}, quantized"
        ),
        _Part(f"**{report.verdict}.** {escape_markdown(verdict_sentence(report))}"),
        *map(_Part, _reasons(report)),
        *map(_Part, _advice(report)),
        _Part(headline_table(report)),
        _Part(_all_checks(report), "checks", 1),
        _Part(custom_part(report), "custom checks", 1),
        _Part(difference_part(report), "differences", 3),
        _Part(task_part(report), "tasks", 2),
        _Part(probe_part(report), "behaviour", 2),
        _Part(footprint_part(report), "footprint", 3),
        _Part(_speed(report), "speed", 3),
        _Part(metric_fold(report), "further metrics", 4),
        *(_Part(text, "kinds of text and positions", 5) for text in place_folds(report)),
        _Part(probe_fold(report), "all probes", 5),
        *(_Part(parting_fold(a, named=several), "worst windows", 8) for a in report.artifacts),
        *(_Part(generation_fold(a, named=several), "continuations", 9) for a in report.artifacts),
        *(_Part(text, "layers", 6) for text in _layers(report)),
        *(_Part(text, "allocation", 7) for text in _allocation(report)),
        *(_Part(text, "KV cache", 7) for text in _kv_cache(report)),
        _Part(predicted_fold(report), "predicted and measured", 6),
        *(_Part(text, "notes", 1) for text in _notes(report)),
        *(_Part(text, "recipe and evidence", 7) for text in _evidence(report)),
    ]
    return _fit([part for part in parts if part.text])


def _fit(parts: Sequence[_Part]) -> str:
    """Join what there is room for."""
    kept, left_out = list(parts), list[str]()
    text = _join(kept, left_out)
    for rank in sorted({part.rank for part in parts if part.rank}, reverse=True):
        if len(text) <= MOST_CHARACTERS:
            return text
        left_out += dict.fromkeys(part.name for part in kept if part.rank == rank)
        kept = [part for part in kept if part.rank != rank]
        text = _join(kept, left_out)
    while len(text) > MOST_CHARACTERS and kept:
        kept.pop()
        text = _join(kept, [*left_out, "the end of this page"])
    return text


def _join(parts: Sequence[_Part], left_out: Sequence[str]) -> str:
    texts = [part.text for part in parts]
    if left_out:
        texts.append(f"Left out for lack of room: {', '.join(left_out)}. report.html has all.")
    return "\n\n".join(texts) + "\n"


def headline_table(report: Report) -> str:
    """Return the headline table as Markdown; the verdict in bold."""
    cells = headline_cells(headline_rows(report))
    if not cells:
        return ""
    rows = [[_cell(title, text) for title, text in row.items()] for row in cells]
    return table([escape_markdown(title) for title in cells[0]], rows)


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


def _all_checks(report: Report) -> str:
    """The checks; of several artifacts folded, as the reasons name those that do not hold."""
    several = len(report.artifacts) > 1
    found = [text for each in report.artifacts if (text := _checks(each, several))]
    if not (several and found):
        return "\n\n".join(found)
    return fold(f"Checks of {len(found)} artifacts", "\n\n".join(found))


def _checks(artifact: ArtifactReport, several: bool) -> str:
    rows = check_rows(artifact.judgement)
    if not rows:
        return ""
    confidence = f"{100 * artifact.judgement.confidence:.4g}%"
    title = f"### Checks of {code_span(artifact.name)}" if several else "### Checks"
    measured = (
        f"Both models read the same {escape_markdown(describe_samples(artifact))}; "
        f"intervals are at {confidence} confidence."
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
    return [fold(summary, table(titles, rows))]


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
        fold(summary, table(titles, rows)),
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
    return [fold(f"KV cache of {len(rows)} attention layers", table(KV_TITLES, rows))]


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
        parts.append(fold("Recipe", body))
    sections = evidence_sections(report.evidence, short=True)
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
        parts.append(fold("Evidence", "\n\n".join(tables)))
    return parts
