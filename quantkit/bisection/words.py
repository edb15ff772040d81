"""A bisection in words: rows of a table, lines, a document, and the files of `--output`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.bisection.records import AGAIN, Bisection, Suspect
from quantkit.durable import write_words
from quantkit.records import Judgement
from quantkit.report.rounding import (
    format_bytes,
    format_percent,
    format_significant,
    format_together,
)
from quantkit.report.rows import check_rows
from quantkit.report.tables import table
from quantkit.report.text import code_block, code_span, escape_markdown

MOST_ROWS = 12
"""Of a table for people; the document has all."""
_TITLES = ("restored", "KL then", "of the loss", "weight error", "adds")


def list_rows(suspects: Sequence[Suspect]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a ranking, its titles first and what it leaves out last."""
    yield _TITLES
    for suspect in suspects[:MOST_ROWS]:
        error = suspect.relative_error
        yield (
            f"{suspect.name}{' (broken)' if suspect.flaw else ''}",
            format_significant(suspect.kl),
            format_percent(suspect.share),
            "" if error is None else format_percent(error),
            format_bytes(suspect.added_bytes),
        )
    if len(suspects) > MOST_ROWS:
        yield (f"... and {len(suspects) - MOST_ROWS} more", "", "", "", "")


def list_facts(found: Bisection) -> Iterator[tuple[str, str]]:
    """Yield what was measured: a name and what is to be said."""
    yield "artifact", f"{found.artifact} ({found.format}, {found.scheme})"
    yield "windows", f"{found.windows} of {found.window_tokens} tokens"
    yield "KL", f"{format_significant(found.kl)}{_show_limit(found, 'max_kl')}"
    (increase,) = format_together((found.perplexity_increase,), percent=True, sign=True)
    yield "perplexity", f"{increase}{_show_limit(found, 'max_perplexity_increase')}"
    agreement = format_percent(found.top1_agreement)
    yield "top-1 agreement", f"{agreement}{_show_limit(found, 'min_top1_agreement')}"


def list_proposal(found: Bisection) -> Iterator[str]:
    """Yield the lines of the proposal; none where there is none."""
    proposal = found.proposal
    if proposal is None:
        return
    yield f"measured on {proposal.judgement.windows} windows: {_show_checks(proposal.judgement)}"
    before = f"{format_bytes(found.tensor_bytes)}, {found.bits_per_weight:.2f} bits per weight"
    after = f"{format_bytes(proposal.tensor_bytes)}, {proposal.bits_per_weight:.2f}"
    if proposal.scheme != AGAIN:
        yield f"size: {before}; with the proposal {after}"
    if proposal.recipe:
        yield "put in front of what the recipe has there, quantize, and let the gate judge again:"
        yield ""
        yield from proposal.recipe.rstrip("\n").splitlines()


def make_document(found: Bisection) -> dict[str, Any]:
    """Return all of it, ready for JSON: what is not finite is null."""
    document: dict[str, Any] = {"exit_code": found.exit_code, **asdict(found)}
    for key in ("judgement",):
        document[key] = _summarize(found.judgement)
    if found.proposal is not None:
        document["proposal"]["judgement"] = _summarize(found.proposal.judgement)
    clean: dict[str, Any] = _without_infinities(document)
    return clean


def write_results(found: Bisection, folder: Path) -> None:
    """Write bisect.json and bisect.md.

    Raises:
        ResourceError, OutputError: they cannot be written.
    """
    text = json.dumps(make_document(found), indent=2, allow_nan=False)
    write_words(folder / "bisect.json", f"{text}\n")
    write_words(folder / "bisect.md", _make_page(found))


def _make_page(found: Bisection) -> str:
    parts = [
        f"# Bisection of {code_span(found.artifact)}",
        f"**{found.outcome}**: {escape_markdown(found.summary)}",
        _list_items(f"{name}: {words}" for name, words in list_facts(found)),
    ]
    for suspects in (found.blocks, found.units):
        titles, *rows = list_rows(suspects)
        cells = [[code_span(row[0], in_table=True), *map(escape_markdown, row[1:])] for row in rows]
        parts += [table(titles, cells)] if cells else []
    if found.proposal is not None:
        told = list(list_proposal(found))
        kept = told[: told.index("")] if "" in told else told
        parts += ["## Proposal", _list_items(kept)]
        parts += [code_block(found.proposal.recipe, "yaml")] if found.proposal.recipe else []
    parts += [_list_items(f"note: {note}" for note in found.notes)] if found.notes else []
    return "\n\n".join(parts) + "\n"


def _list_items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)


def _show_limit(found: Bisection, name: str) -> str:
    limit = found.limits.get(name)
    if limit is None:
        return ""
    is_percentage = name != "max_kl"
    words = format_percent(limit) if is_percentage else format_significant(limit)
    return f" (limit {words})"


def _show_checks(judgement: Judgement) -> str:
    return "; ".join(
        f"{row.label} {row.value} ({row.interval}), {row.limit}: {row.verdict}"
        for row in check_rows(judgement)
    )


def _summarize(judgement: Judgement | None) -> dict[str, Any] | None:
    if judgement is None:
        return None
    return {
        "verdict": judgement.verdict,
        "windows": judgement.windows,
        "confidence": judgement.confidence,
        "checks": [asdict(check) for check in judgement.checks],
        "reasons": list(judgement.reasons),
    }


def _without_infinities(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_infinities(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_infinities(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
