"""What every judgement does with its limits: compare, combine, and say why (docs/gate.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantkit.errors import WorkerError
from quantkit.judging.words import name_check
from quantkit.records import Check, Judgement, Metric, TaskResult, Verdict

UNJUDGED = Judgement("UNJUDGED", (), ("the gate was not run",), None, None, None, 0.0, 0)
"""The judgement of an artifact that no gate has seen."""


def fail_worker(error: WorkerError, confidence: float, suspicions: Sequence[str] = ()) -> Judgement:
    """Return the judgement of an artifact whose worker died, hung or answered nonsense.

    Args:
        suspicions: what other checks had found; it may say why.
    """
    return Judgement("FAIL", (), (str(error), *suspicions), None, None, None, confidence, 0)


def note_no_speed(judgement: Judgement, reason: str) -> Judgement:
    """Return the judgement with a note on why there is no speed in it."""
    note = f"its speed was not measured: {' '.join(reason.split())}"
    return replace(judgement, notes=(*judgement.notes, note))


def compare_limit(name: str, limit: float, metric: Metric) -> Verdict:
    """PASS where the whole interval of `metric` is within `limit`, FAIL where all is outside.

    Args:
        name: of the check; `max_` begins that of an upper limit.
    """
    if name.startswith("max_"):
        within, outside = metric.high <= limit, metric.low > limit
    else:
        within, outside = metric.low >= limit, metric.high < limit
    if within:
        return "PASS"
    return "FAIL" if outside else "INCONCLUSIVE"


def combine_checks(checks: Sequence[Check | TaskResult]) -> Verdict:
    """Return the verdict of all checks together; none at all proves nothing."""
    verdicts = {check.verdict for check in checks}
    if "FAIL" in verdicts:
        return "FAIL"
    return "PASS" if verdicts == {"PASS"} else "INCONCLUSIVE"


def explain_check(check: Check, confidence: float) -> str:
    """Return one sentence on a check that did not pass."""
    words, is_percentage = name_check(check.name)
    value, low, high, limit = _write_apart(
        (check.value, check.low, check.high, check.limit), is_percentage
    )
    side = "above" if check.name.startswith("max_") else "below"
    place = f"{side} the limit" if check.verdict == "FAIL" else "not proven to be within the limit"
    return (
        f"{words} of {value} ({100 * confidence:g}% interval {low} to {high}) is {place} of {limit}"
    )


def explain_task(task: TaskResult, confidence: float) -> str:
    """Return one sentence on a task with a limit that it did not pass."""
    value, low, high, limit = _write_apart(
        (task.recovery, task.low, task.high, task.limit or 0.0), True
    )
    place = "below the limit" if task.verdict == "FAIL" else "not proven to be within the limit"
    return (
        f"recovery of {value} at task {task.name} ({task.metric}, {task.samples} documents; "
        f"{100 * confidence:g}% interval {low} to {high}) is {place} of {limit}"
    )


def _write_apart(numbers: Sequence[float], is_percentage: bool) -> list[str]:
    """Write numbers with four digits, or up to eight to tell different ones apart."""
    factor, sign = (100, "%") if is_percentage else (1, "")
    texts: list[str] = []
    for digits in range(4, 9):
        texts = [f"{factor * number:.{digits}g}{sign}" for number in numbers]
        if len(set(texts)) == len(set(numbers)):
            break
    return texts
