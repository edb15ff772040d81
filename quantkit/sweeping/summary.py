"""sweep.json, sweep.md, and of each model the page that sets its artifacts side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quantkit.durable import write_words
from quantkit.errors import writing
from quantkit.evidence import decide_verdict
from quantkit.judging.differences import find_differences
from quantkit.records import Report
from quantkit.report import write_reports
from quantkit.report.choice import comparison_sentence
from quantkit.report.tables import table
from quantkit.report.text import clean_line, code_span, escape_markdown
from quantkit.sweeping.jobs import REPORTS, name_model
from quantkit.sweeping.outcomes import evaluation_hash, find_exit_code, sort_outcomes
from quantkit.sweeping.records import JobOutcome, SweepResult
from quantkit.sweeping.rows import TITLES, SweepRow, name_artifacts, sweep_document, sweep_rows


def summarize(outcomes: Sequence[JobOutcome], root: Path, *, finished: bool = True) -> SweepResult:
    """Write what is known of a sweep into `root`.

    Args:
        outcomes: of all jobs.
        finished: nothing more will come: the pages of the models are written too.

    Raises:
        ResourceError, OutputError: a file cannot be written.
    """
    rows = sort_outcomes(outcomes)
    found = dict(_compare(rows)) if finished else {}
    pages = _name_pages(found, root / REPORTS)
    for model, report in found.items():
        write_reports(report, pages[model])
    result = SweepResult(
        root,
        rows,
        {model: comparison_sentence(report) for model, report in found.items()},
        {model: folder / "report.html" for model, folder in pages.items()},
        find_exit_code(rows),
    )
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    text = json.dumps(sweep_document(result), indent=2, ensure_ascii=False, allow_nan=False)
    write_words(root / "sweep.json", text + "\n")
    write_words(root / "sweep.md", render_markdown(result))
    return result


def _name_pages(models: Iterable[str], folder: Path) -> dict[str, Path]:
    """Give each model a folder; of one name in two places, the second gets a number."""
    pages: dict[str, Path] = {}
    for model in models:
        name = name_model(model)
        taken = sum(name_model(other) == name for other in pages)
        pages[model] = folder / (f"{name}-{taken + 1}" if taken else name)
    return pages


def _compare(outcomes: Sequence[JobOutcome]) -> Iterator[tuple[str, Report]]:
    """Yield of each model that has artifacts the report in which they compete."""
    for model in dict.fromkeys(outcome.job.model for outcome in outcomes):
        own = [each for each in outcomes if each.job.model == model and each.artifacts]
        if not own:
            continue
        named = {name: artifact for outcome in own for name, artifact in name_artifacts(outcome)}
        judgements = {name: artifact.judgement for name, artifact in named.items()}
        alike = len({evaluation_hash(outcome) for outcome in own}) == 1
        notes = [] if alike else ["not all were judged on the same text: see each job's report"]
        yield (
            model,
            Report(
                model=model,
                baseline_bytes=own[0].baseline_bytes,
                artifacts=tuple(named.values()),
                verdict=decide_verdict(list(judgements.values()), comparison=True),
                layers=(),
                notes=tuple(notes),
                evidence=_evidence(own),
                comparison=True,
                differences=find_differences(judgements) if alike else (),
            ),
        )


def _evidence(outcomes: Sequence[JobOutcome]) -> dict[str, Any]:
    """What all jobs have in common, and the recipe of each."""
    records: list[Mapping[str, Any]] = [outcome.evidence or {} for outcome in outcomes]
    common = ("model", "evaluation", "versions", "compute")
    shared = {
        key: records[0].get(key)
        for key in common
        if all(record.get(key) == records[0].get(key) for record in records)
    }
    names = [outcome.job.name for outcome in outcomes]
    return {**shared, "jobs": dict(zip(names, (job.job.recipe for job in outcomes), strict=True))}


def render_markdown(result: SweepResult) -> str:
    """Return sweep.md: the table with a link to each report, and what failed and why."""
    root = result.output_root
    parts = ["# Sweep"]
    parts += [
        f"**{escape_markdown(model)}**: {escape_markdown(sentence)} "
        f"[Side by side]({_link(result.reports[model], root)})"
        for model, sentence in result.choices.items()
    ]
    titles = ("Job", "Recipe", "Model", *TITLES[1:], "Report")
    parts.append(table(titles, (_markdown_row(row, root) for row in sweep_rows(result))))
    failed = [outcome for outcome in result.outcomes if outcome.error is not None]
    if failed:
        parts.append("\n".join(_failure(each, root) for each in failed))
    return "\n\n".join(parts) + "\n"


def _markdown_row(row: SweepRow, root: Path) -> list[str]:
    outcome = row.outcome
    name, verdict, *figures = row.cells
    page = "" if outcome.report is None else f"[report]({_link(outcome.report, root)})"
    spans = [
        code_span(text, in_table=True) for text in (name, outcome.job.recipe, outcome.job.model)
    ]
    return [*spans, f"**{verdict}**" if verdict == "PASS" else verdict, *figures, page]


def _failure(outcome: JobOutcome, root: Path) -> str:
    reason = escape_markdown(clean_line(outcome.error or ""))
    return f"- {code_span(outcome.job.name)}: {reason} ([log]({_link(outcome.job.log, root)}))"


def _link(path: Path, root: Path) -> str:
    return quote(Path(os.path.relpath(path, root)).as_posix())
