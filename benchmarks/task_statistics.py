"""Simulate the verdict of a task whose documents are right or wrong: how often is it mistaken?

Documents are drawn from models whose true recovery lies on the limit, or at 1. The verdict is the
product's own; beside it stands that of the interval of means, which knows nothing of what it has
not seen.

usage: python benchmarks/task_statistics.py [--repetitions 2000]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from measure import describe_commit, write_results

from quantkit.judging.statistics import mean_intervals
from quantkit.judging.tasks.scores import score_task

CONFIDENCE = 0.95
DOCUMENTS = (50, 100, 200, 500)
BASELINES = (0.4, 0.8)
LIMITS = (0.9, 0.95, 0.98)
WON = (0.0, 0.02, 0.05)
"""Share of the documents that the artifact alone has right."""


@dataclass(frozen=True)
class Row:
    """Shares of the repetitions, for one number of documents and one limit."""

    documents: int
    baseline: float
    limit: float
    won: float
    false_pass: float
    false_fail: float
    false_pass_of_means: float
    passed_unchanged: float
    """Of artifacts that win as many documents as they lose."""


def main() -> None:
    """Simulate and write the table."""
    parser = argparse.ArgumentParser(description="simulate the verdict of tasks")
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    rows = list(simulate(np.random.default_rng(0), repetitions))
    write_results(
        "task_statistics",
        {"commit": describe_commit(), "repetitions": repetitions, "rows": [*map(asdict, rows)]},
        write_report(rows, repetitions),
    )


def simulate(draw: np.random.Generator, repetitions: int) -> Iterator[Row]:
    """Yield a row for each setting that there can be."""
    for documents in DOCUMENTS:
        for baseline in BASELINES:
            for limit in LIMITS:
                for won in WON:
                    lost = won + (1 - limit) * baseline
                    at_limit = count(draw, documents, (lost, won, baseline), limit, repetitions)
                    same = count(draw, documents, (won, won, baseline), limit, repetitions)
                    yield Row(documents, baseline, limit, won, *at_limit[:3], same[0])


def count(
    draw: np.random.Generator,
    documents: int,
    shares: tuple[float, float, float],
    limit: float,
    repetitions: int,
) -> tuple[float, float, float]:
    """Return how often the task passes, fails, and passes by the interval of means.

    Args:
        shares: of the documents: lost, won, and right under the baseline.
    """
    lost, won, right = shares
    cells = draw.multinomial(documents, [lost, won, right - lost, 1 - right - won], repetitions)
    settings, times = np.unique(cells, axis=0, return_counts=True)
    found = np.zeros(3)
    for cell, number in zip(settings, times, strict=True):
        found += number * np.array(judge(cell, limit))
    return tuple(found / repetitions)


def judge(cell: np.ndarray, limit: float) -> tuple[bool, bool, bool]:
    """Return whether documents (lost, won, both right, both wrong) pass, fail, pass by means."""
    baseline = np.repeat([1.0, 0.0, 1.0, 0.0], cell)
    artifact = np.repeat([0.0, 1.0, 1.0, 0.0], cell)
    verdict = score_task(
        "simulated",
        "acc",
        "mean",
        (baseline.tolist(), artifact.tolist()),
        higher_is_better=True,
        limit=limit,
        confidence=CONFIDENCE,
    ).verdict
    difference = mean_intervals((artifact - baseline)[:, None], CONFIDENCE)[0, 0]
    means = bool(baseline.any()) and 1 + difference / baseline.mean() >= limit
    return verdict == "PASS", verdict == "FAIL", bool(means)


def write_report(rows: list[Row], repetitions: int) -> str:
    """Write the table."""
    worst = max(row.false_pass for row in rows)
    means = max(row.false_pass_of_means for row in rows)
    lines = [
        f"A task of right and wrong answers at a confidence of {CONFIDENCE}, {repetitions} "
        f"repetitions a row. The most false PASS in any row is {100 * worst:.1f} %; by the "
        f"interval of means it would be {100 * means:.1f} %. `won`: documents that the artifact "
        "alone has right. `PASS, unchanged`: of artifacts that lose as many documents as they win.",
        "",
        "| documents | baseline | limit | won | false PASS | false FAIL | false PASS, means "
        "| PASS, unchanged |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        numbers = (row.false_pass, row.false_fail, row.false_pass_of_means, row.passed_unchanged)
        cells = " | ".join(f"{100 * number:.1f} %" for number in numbers)
        setting = f"{row.documents} | {row.baseline:g} | {row.limit:g} | {100 * row.won:g} %"
        lines.append(f"| {setting} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
