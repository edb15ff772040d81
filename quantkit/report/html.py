"""report.html: one file that needs no network, with the plot, the tables and the evidence."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantkit.records import ArtifactReport, Report
from quantkit.report import pareto, plot, positions
from quantkit.report.advice import all_reasons, suggestions, verdict_sentence
from quantkit.report.allocation import allocation_table
from quantkit.report.bars import CheckBar, check_bar
from quantkit.report.custom import CustomRow, custom_rows
from quantkit.report.details import domain_rows, metric_rows, range_rows, several
from quantkit.report.evidence import evidence_sections, recipe_changes, recipe_text
from quantkit.report.footprints import (
    difference_rows,
    footprint_notes,
    footprint_rows,
    order_sentence,
)
from quantkit.report.kv import KV_TITLES, kv_rows
from quantkit.report.layers import (
    geometric_mean,
    layer_rows,
    rounding_ratio,
    worst_layers,
)
from quantkit.report.partings import (
    GenerationView,
    PartingView,
    count_same,
    generation_views,
    parting_views,
)
from quantkit.report.predicted import PREDICTED_LEAD, PREDICTED_TITLES, predicted_rows
from quantkit.report.probes import ProbeRow, TaskRow, probe_rows, task_rows
from quantkit.report.rounding import format_bytes
from quantkit.report.rows import (
    CheckRow,
    check_rows,
    describe_samples,
    headline_figures,
    headline_rows,
    speed_rows,
)
from quantkit.report.text import clean

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class _Judged:
    """What is shown of one artifact alone; each check with its bar where one can be drawn."""

    artifact: ArtifactReport
    confidence: str
    samples: str
    """What the artifact was judged on, and where, for instance `128 texts in vllm`."""
    rows: tuple[tuple[CheckRow, CheckBar | None], ...]
    customs: tuple[CustomRow, ...]
    probes: tuple[ProbeRow, ...]
    partings: tuple[PartingView, ...]
    generations: tuple[GenerationView, ...]
    same_generations: int


def render_html(report: Report) -> str:
    """Return the report as one HTML page.

    Every value is escaped, and the page's own policy allows neither the network nor any script or
    style but the two that are part of it.
    """
    style, script = _read("report.css"), _read("report.js")
    rows = headline_rows(report)
    ranges, domains = range_rows(report), domain_rows(report)
    context: dict[str, Any] = {
        "report": report,
        "sentence": verdict_sentence(report),
        "reasons": all_reasons(report),
        "suggestions": suggestions(report),
        "baseline_size": format_bytes(report.baseline_bytes),
        "headline": tuple(zip(rows, headline_figures(rows), strict=True)),
        "speed": speed_rows(report),
        "encoders": [row.is_encoder for row in rows],
        "judged": tuple(map(_judged, report.artifacts)),
        "tasks": _tasks(report),
        "differences": difference_rows(report),
        "order": order_sentence(report),
        "footprints": footprint_rows(report),
        "footprint_notes": footprint_notes(footprint_rows(report)),
        "metrics": metric_rows(report),
        "positions": positions.position_plot(report),
        "positions_geometry": positions,
        "ranges": ranges,
        "several_ranges": several(ranges),
        "domains": domains,
        "several_domains": several(domains),
        "pareto": pareto.pareto_plot(report),
        "pareto_geometry": pareto,
        "plot": plot.error_plot(report.layers),
        "geometry": plot,
        "layers": layer_rows(report.layers),
        "worst": layer_rows(worst_layers(report.layers)),
        "mean_ratio": _mean_ratio(report),
        "allocation": allocation_table(report),
        "kv_titles": KV_TITLES,
        "kv_rows": kv_rows(report.kv_cache),
        "predicted": predicted_rows(report),
        "predicted_lead": PREDICTED_LEAD,
        "predicted_titles": PREDICTED_TITLES,
        "recipe": recipe_text(report.evidence),
        "changes": recipe_changes(report.evidence),
        "evidence": evidence_sections(report.evidence),
        "style": Markup(style),
        "script": Markup(script),
        "policy": "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src {_source_hash(style)}; script-src {_source_hash(script)}",
    }
    return _environment().get_template("report.html.jinja").render(context)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_showable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _showable(value: Any) -> Any:
    """Clean text of what no page can hold; markup of our own passes."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _judged(artifact: ArtifactReport) -> _Judged:
    rows = tuple(
        (row, check_bar(row.check, is_upper=row.is_upper, is_share=_is_share(row.check.name)))
        for row in check_rows(artifact.judgement)
    )
    return _Judged(
        artifact=artifact,
        confidence=f"{100 * artifact.judgement.confidence:.4g}%",
        samples=describe_samples(artifact),
        rows=rows,
        customs=custom_rows(artifact),
        probes=probe_rows(artifact),
        partings=parting_views(artifact),
        generations=generation_views(artifact),
        same_generations=count_same(generation_views(artifact)),
    )


def _tasks(report: Report) -> list[tuple[str, TaskRow]]:
    """Name of the artifact and its row; the artifacts of one task one after the other."""
    found = [(artifact.name, row) for artifact in report.artifacts for row in task_rows(artifact)]
    order = list(dict.fromkeys((row.name, row.metric) for _, row in found))
    return sorted(found, key=lambda pair: order.index((pair[1].name, pair[1].metric)))


def _is_share(name: str) -> bool:
    return any(word in name for word in ("agreement", "cosine", "overlap"))


def _mean_ratio(report: Report) -> str:
    ratios = [ratio for ratio in map(rounding_ratio, report.layers) if ratio is not None]
    mean = geometric_mean(ratios)
    return "" if mean is None else f"{mean:.2f}×"
