"""The results of quality.py: who took part, what the judge found, and the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from contest import Judged, describe_versions
from measure import Measured

TARGETS = {"w4a16": 0.85, "w8a8": 1.0, "fp8_dynamic": 1.0}
"""Scheme -> what our KL may be of the best rival's."""
TITLES = {"w4a16": "W4A16, groups of 128", "w8a8": "W8A8, INT8", "fp8_dynamic": "FP8, dynamic"}


@dataclass(frozen=True)
class Contestant:
    """One tool with one method; for quantkit also the effort."""

    tool: str
    method: str
    effort: str = ""

    @property
    def label(self) -> str:
        """How tables name the method."""
        return f"{self.method}, effort {self.effort}" if self.effort else self.method

    @property
    def key(self) -> str:
        """Name of the contestant's folder, log and record."""
        return "-".join(filter(None, (self.tool, self.method, self.effort)))


@dataclass(frozen=True)
class Row:
    """What became of one contestant on one model in one scheme."""

    contestant: Contestant
    measured: Measured | None = None
    judged: Judged | None = None
    bits_per_weight: float = 0.0
    stored: bool = False
    """Taken from an earlier run, which `--skip-rivals` asked for."""
    error: str = ""


@dataclass(frozen=True)
class Table:
    """All contestants on one model in one scheme."""

    model: str
    scheme: str
    rows: tuple[Row, ...]

    @property
    def best_rival(self) -> Row | None:
        """The rival with the lowest KL."""
        return _lowest(row for row in self.rows if row.contestant.tool != "quantkit")

    @property
    def best_of_ours(self) -> Row | None:
        """The row of quantkit with the lowest KL."""
        return _lowest(row for row in self.rows if row.contestant.tool == "quantkit")

    def ratio(self, row: Row | None) -> float | None:
        """Return a row's KL in those of the best rival."""
        best = self.best_rival
        if row is None or row.judged is None or best is None or best.judged is None:
            return None
        return row.judged.kl / best.judged.kl

    def verdict(self, row: Row | None) -> str:
        """Return PASS or MISS for a row of quantkit; nothing where there is no ratio."""
        ratio = self.ratio(row)
        return "" if ratio is None else "PASS" if ratio <= TARGETS[self.scheme] else "MISS"


def _lowest(rows: Iterator[Row]) -> Row | None:
    judged = [(row.judged.kl, index, row) for index, row in enumerate(rows) if row.judged]
    return min(judged)[2] if judged else None


def render(document: dict[str, Any], tables: Sequence[Table]) -> str:
    """Return the results as Markdown."""
    calibration, evaluation = (document["windows"][name] for name in ("calibration", "evaluation"))
    lines = [
        "# Quality against other tools",
        "",
        f"{calibration['shape'][0]} calibration windows of {calibration['shape'][1]} tokens for "
        f"every tool, the same; judged on {evaluation['shape'][0]} windows of "
        f"{evaluation['shape'][1]} tokens. KL(16-bit model || artifact) in nats per token, over "
        "the whole vocabulary, in float32, activations quantized as the artifact says.",
        "",
        "| scheme | model | best rival | its KL | our KL | ratio | target | |",
        "|---|---|---|---:|---:|---:|---:|---|",
        *(_summary_line(table) for table in tables),
        "",
    ]
    for table in tables:
        lines += _render_table(table)
    machine = document["machine"]
    stored = any(row.stored for table in tables for row in table.rows)
    lines += [
        "CPU time is that of the whole job on all cores, from the command to the files on disk."
        + (" Rows marked * are from an earlier run (`--skip-rivals`)." if stored else ""),
        "",
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- quantkit: {describe_versions(document['versions'])}; commit {document['commit']}",
        *(
            f"- {tool}: {describe_versions(found)}"
            for tool, found in document["rival_versions"].items()
        ),
        f"- command: `{document['command']}`",
        "",
    ]
    return "\n".join(lines)


def _summary_line(table: Table) -> str:
    rival, ours = table.best_rival, table.best_of_ours
    ratio = table.ratio(ours)
    cells = [
        TITLES[table.scheme],
        table.model,
        f"{rival.contestant.tool} {rival.contestant.label}" if rival else "none",
        *(f"{row.judged.kl:.5f}" if row and row.judged else "-" for row in (rival, ours)),
        "-" if ratio is None else f"{ratio:.3f}",
        f"{TARGETS[table.scheme]:.2f}",
        table.verdict(ours),
    ]
    return f"| {' | '.join(cells)} |"


def _render_table(table: Table) -> list[str]:
    baselines = [row.judged.baseline_perplexity for row in table.rows if row.judged]
    known = f"; the 16-bit model's perplexity is {baselines[0]:.3f}" if baselines else ""
    lines = [
        f"## {table.model}, {TITLES[table.scheme]}",
        "",
        f"Target: {TARGETS[table.scheme]:.2f} of the best rival's KL{known}.",
        "",
        "| tool | method | KL, nats | of the best rival | perplexity | top-1 agreement "
        "| bits per weight | CPU time, s | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in table.rows:
        lines.append(_render_row(table, row))
    return [*lines, ""]


def _render_row(table: Table, row: Row) -> str:
    contestant, judged, measured = row.contestant, row.judged, row.measured
    name = f"| {contestant.tool} | {contestant.label}{' *' if row.stored else ''} |"
    if judged is None or measured is None:
        return f"{name} failed: {row.error.replace('|', '/')} | | | | | | |"
    ratio = table.ratio(row)
    verdict = table.verdict(row) if contestant.tool == "quantkit" else ""
    return (
        f"{name} {judged.kl:.5f} | {'' if ratio is None else f'{ratio:.3f}'} "
        f"| {judged.perplexity:.3f} | {judged.agreement:.2%} | {row.bits_per_weight:.3f} "
        f"| {measured.cpu_seconds:.0f} | {verdict} |"
    )
