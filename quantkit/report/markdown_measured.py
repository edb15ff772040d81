"""Parts of report.md: probes, tasks, what running takes, and where the models differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantkit.records import ArtifactReport, Report
from quantkit.report.details import domain_rows, metric_rows, range_rows, several
from quantkit.report.footprints import (
    difference_rows,
    footprint_notes,
    footprint_rows,
    order_sentence,
)
from quantkit.report.partings import (
    ChoiceView,
    GenerationView,
    PartingView,
    count_same,
    generation_views,
    parting_views,
)
from quantkit.report.predicted import PREDICTED_LEAD, PREDICTED_TITLES, predicted_rows
from quantkit.report.probes import ProbeRow, count_judged, probe_rows, task_rows, unsettled_probes
from quantkit.report.rounding import ABSENT, format_count
from quantkit.report.tables import fold, table
from quantkit.report.text import code_block, code_span, escape_markdown

MOST_CONTINUATIONS = 4
"""More fill a comment; report.html has all."""


def probe_part(report: Report) -> str:
    """Return the probes that want a look as a table, and a line on the others."""
    rows: list[Sequence[str]] = []
    held = unlimited = 0
    for artifact in report.artifacts:
        found = probe_rows(artifact)
        rows += _probe_cells(artifact, unsettled_probes(artifact))
        held += sum(row.is_judged and row.verdict == "PASS" for row in found)
        unlimited += len(found) - count_judged(found)
    if not (rows or held or unlimited):
        return ""
    words = [f"{held} within {'its limit' if held == 1 else 'their limits'}"] if held else []
    words += [f"{unlimited} without a limit"] if unlimited else []
    probes = "probe" if held + unlimited == 1 else "probes"
    line = (
        f"{'Other probes' if rows else probes.capitalize()}: {', '.join(words)}." if words else ""
    )
    titles = ["Artifact", "Probe", "Value", "Limit", "Verdict", "Found"]
    body = [table(titles, rows)] if rows else []
    return "\n\n".join(["### Behaviour", *body, *([line] if line else [])])


def probe_fold(report: Report) -> str:
    """Return all probes, folded."""
    rows = [cells for each in report.artifacts for cells in _probe_cells(each, probe_rows(each))]
    titles = ["Artifact", "Probe", "Value", "Limit", "Verdict", "Found"]
    return (
        fold(f"{format_count(len(rows), 'probe')} of behaviour", table(titles, rows))
        if rows
        else ""
    )


def task_part(report: Report) -> str:
    """Return the tasks of all artifacts."""
    several_artifacts = len(report.artifacts) > 1
    parts = []
    for artifact in report.artifacts:
        found = task_table(artifact)
        if found:
            parts += [f"{code_span(artifact.name)}:", found] if several_artifacts else [found]
    return "\n\n".join(["### Tasks", *parts]) if parts else ""


def task_table(artifact: ArtifactReport) -> str:
    """Return an artifact's tasks as a table; empty without any."""
    rows = [
        [
            escape_markdown(row.name),
            escape_markdown(row.metric),
            row.samples,
            escape_markdown(row.scores),
            escape_markdown(f"{row.recovery} ({row.interval})"),
            escape_markdown(row.limit),
            escape_markdown(row.p_value),
            escape_markdown(row.lost_won),
            f"**{row.verdict}**" if row.is_judged else "no limit",
        ]
        for row in task_rows(artifact)
    ]
    titles = ["Task", "Metric", "Documents", "Baseline → artifact", "Recovery", "Limit"]
    titles += ["McNemar p", "Lost / won", "Verdict"]
    return table(titles, rows) if rows else ""


def difference_part(report: Report) -> str:
    """Return the order of what competes as a sentence, and the pairs folded."""
    rows = [
        [
            code_span(row.closer, in_table=True),
            code_span(row.further, in_table=True),
            row.difference,
            row.interval,
            str(row.windows),
            "yes" if row.significant else "**no**",
        ]
        for row in difference_rows(report)
    ]
    if not rows:
        return ""
    titles = ["Closer", "Further", "By (KL, nats)", "Interval", "Windows", "Significant"]
    sentence = escape_markdown(order_sentence(report))
    parts = ["### Which differences are significant", *([sentence] if sentence else [])]
    return "\n\n".join([*parts, fold(format_count(len(rows), "pair"), table(titles, rows))])


def footprint_part(report: Report) -> str:
    """Return what running each artifact takes."""
    found = footprint_rows(report)
    rows = [
        [
            code_span(row.artifact, in_table=True),
            *(escape_markdown(t) for t in (row.load, row.memory, row.prefill, row.decoding)),
            escape_markdown(row.where),
        ]
        for row in found
    ]
    titles = ["Artifact", "Load", "Memory", "Prefill", "Decoding", "In"]
    notes = "\n".join(f"- {escape_markdown(note)}" for note in footprint_notes(found))
    parts = ["### Footprint", table(titles, rows), *([notes] if notes else [])]
    return "\n\n".join(parts) if rows else ""


def predicted_fold(report: Report) -> str:
    """Return what was foretold beside what the job took, folded."""
    rows = [
        [escape_markdown(text) for text in (row.what, row.predicted, row.measured)]
        for row in predicted_rows(report)
    ]
    if not rows:
        return ""
    body = f"{escape_markdown(PREDICTED_LEAD)}\n\n{table(PREDICTED_TITLES, rows)}"
    return fold("Predicted and measured", body)


def metric_fold(report: Report) -> str:
    """Return the further metrics, folded."""
    rows = [
        [
            code_span(row.artifact, in_table=True),
            row.kl_p99,
            row.kl_max,
            *(_with_interval(*pair) for pair in (row.reverse_kl, row.top5_agreement, row.flips)),
            row.lost_won,
        ]
        for row in metric_rows(report)
    ]
    titles = ["Artifact", "KL, 99th percentile", "KL, largest", "Reverse KL", "Top-5 agreement"]
    titles += ["Flips", "Lost / won"]
    return fold("Further metrics", table(titles, rows)) if rows else ""


def place_folds(report: Report) -> list[str]:
    """Return the tables by kind of text and by position, each folded."""
    domains, ranges = domain_rows(report), range_rows(report)
    parts = []
    if domains:
        cells = [
            [
                *_name(row.artifact, several(domains)),
                escape_markdown(row.name),
                f"{row.windows:,}",
                f"{row.tokens:,}",
                _with_interval(row.kl, row.interval),
                escape_markdown(row.perplexity_increase),
                row.top1_agreement,
            ]
            for row in domains
        ]
        titles = ["Kind of text", "Windows", "Tokens", "KL (nats)", "Perplexity increase"]
        titles += ["Top-1 agreement"]
        parts.append(fold("By kind of text", table(_titles(titles, several(domains)), cells)))
    if ranges:
        cells = [
            [
                *_name(row.artifact, several(ranges)),
                row.label,
                _with_interval(row.kl, row.interval),
                row.top1_agreement,
            ]
            for row in ranges
        ]
        titles = ["Tokens read", "KL (nats)", "Top-1 agreement"]
        parts.append(fold("By position", table(_titles(titles, several(ranges)), cells)))
    return parts


def parting_fold(artifact: ArtifactReport, *, named: bool) -> str:
    """Return the worst windows of an artifact, folded."""
    views = parting_views(artifact)
    whose = " of one artifact" if named else ""
    if not views:
        return ""
    parts = [code_span(artifact.name)] if named else []
    for view in views:
        parts += _parting(view)
    return fold(f"{format_count(len(views), 'worst window')}{whose}", "\n\n".join(parts))


def generation_fold(artifact: ArtifactReport, *, named: bool) -> str:
    """Return the continuations of an artifact, folded."""
    views = generation_views(artifact)
    whose = " of one artifact" if named else ""
    if not views:
        return ""
    parts = [code_span(artifact.name)] if named else []
    for view in views[:MOST_CONTINUATIONS]:
        parts += _generation(view)
    summary = f"{format_count(len(views), 'continuation')} side by side{whose}"
    summary += f", {count_same(views)} the same"
    if len(views) > MOST_CONTINUATIONS:
        summary += f", {MOST_CONTINUATIONS} shown"
    return fold(summary, "\n\n".join(parts))


def _parting(view: PartingView) -> list[str]:
    head = (
        f"**Window {view.window}** (KL {view.kl}), after {format_count(view.tokens_read, 'token')} "
        f"({view.position_kl} nats). {escape_markdown(view.sentence)} "
        f"In the text came {code_span(view.actual)}."
    )
    longest = max(len(view.baseline), len(view.artifact))
    rows = [[*_choice(view.baseline, i), *_choice(view.artifact, i)] for i in range(longest)]
    titles = ["Baseline", "", "Artifact", ""]
    return [head, code_block(view.before), table(titles, rows)]


def _choice(choices: Sequence[ChoiceView], number: int) -> list[str]:
    if number >= len(choices):
        return ["", ""]
    choice = choices[number]
    came = " (came)" if choice.came else ""
    return [code_span(choice.text, in_table=True) + came, escape_markdown(choice.probability)]


def _generation(view: GenerationView) -> list[str]:
    if view.is_same:
        return [
            f"The same to the end ({format_count(view.same_tokens, 'token')}):",
            code_block(f"{view.prompt}\n---\n{view.common}"),
        ]
    return [
        f"The same for {format_count(view.same_tokens, 'token')}; baseline, then artifact:",
        code_block(view.prompt),
        code_block(view.common + view.baseline_rest + _end(view.baseline_ended)),
        code_block(view.common + view.artifact_rest + _end(view.artifact_ended)),
    ]


def _end(ended: bool) -> str:
    return "\n[ended by itself]" if ended else ""


def _probe_cells(artifact: ArtifactReport, rows: Iterable[ProbeRow]) -> list[list[str]]:
    return [
        [
            code_span(artifact.name, in_table=True),
            escape_markdown(row.label),
            escape_markdown(row.value),
            escape_markdown(row.limit),
            f"**{row.verdict}**" if row.is_judged else "no limit",
            escape_markdown(row.detail) or ABSENT,
        ]
        for row in rows
    ]


def _titles(titles: Sequence[str], named: bool) -> list[str]:
    return ["Artifact", *titles] if named else [*titles]


def _name(artifact: str, named: bool) -> list[str]:
    return [code_span(artifact, in_table=True)] if named else []


def _with_interval(value: str, interval: str) -> str:
    return escape_markdown(f"{value} ({interval})")
