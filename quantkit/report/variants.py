"""The card of a repository that holds several artifacts of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.records import ArtifactReport, Report
from quantkit.report.model_card import front_matter, model_name
from quantkit.report.rows import headline_cells, headline_rows
from quantkit.report.tables import table
from quantkit.report.text import code_span, escape_markdown
from quantkit.report.usage import Place, serve_command


@dataclass(frozen=True)
class Variant:
    """One artifact of a repository."""

    report: Report
    artifact: ArtifactReport
    place: Place


def render_variants_card(variants: Sequence[Variant], carried: Mapping[str, Any]) -> str:
    """Return the card of a repository that has nothing but variants in folders.

    Args:
        variants: at least one.
        carried: front matter of the original's card.
    """
    report = variants[0].report
    parts = [
        front_matter([(variant.report, variant.artifact) for variant in variants], carried),
        f"# {escape_markdown(model_name(report))}, quantized",
        "Each variant was measured against its 16-bit original and is within every limit of its "
        "gate.",
        render_variants(variants),
    ]
    return "\n\n".join(parts) + "\n"


def render_variants(variants: Sequence[Variant]) -> str:
    """Return the section that lists artifacts, what was measured, and how to run each."""
    cells = []
    for variant in variants:
        (row,) = headline_cells(
            headline_rows(replace(variant.report, artifacts=(variant.artifact,)))
        )
        cells.append({"Variant": variant.place.folder or "(root)", **row})
    titles = list(dict.fromkeys(title for row in cells for title in row))
    titles = [title for title in titles if title not in ("Format", "Verdict")]
    lines = [[escape_markdown(row.get(title, "")) for title in titles] for row in cells]
    commands = [
        f"- {_link(variant.place)}: {code_span(serve_command(variant.artifact, variant.place))}"
        for variant in variants
    ]
    return "\n\n".join(["## Variants", table(titles, lines), "To run one:", "\n".join(commands)])


def _link(place: Place) -> str:
    """The folder's own card has the recipe and every check."""
    if not place.folder:
        return "at the root"
    return f"[{escape_markdown(place.folder)}]({place.folder}/README.md)"
