"""What a job has left -> its outcome; the order of outcomes, and what they mean to the shell."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.errors import CheckpointError
from quantkit.records import EXIT_CODES, Verdict
from quantkit.report.reading import read_artifact
from quantkit.sweeping.finished import EVIDENCE
from quantkit.sweeping.records import Ended, JobOutcome, SweepJob

DEFECT, BAD_INPUT, NO_RESOURCES, INTERRUPTED = 1, 2, 5, 130

WORST_FIRST = (DEFECT, INTERRUPTED, NO_RESOURCES, BAD_INPUT, 3, 4, 0)
"""Exit codes of jobs: the first of them that a job has is that of the sweep (docs/sweep.md)."""

_VERDICTS: tuple[Verdict, ...] = ("PASS", "UNJUDGED", "INCONCLUSIVE", "FAIL")
_LAST_LINES = 3
_STAGES = ("prepare", "allocate", "quantize", "write", "gate")
"""Of a job, one after the other; what else has been timed is a part of these."""


def read_outcome(job: SweepJob, ended: Ended | None, *, resumed: bool = False) -> JobOutcome:
    """Return what became of a job.

    Args:
        job: which.
        ended: how its process ended; None: an earlier run had finished it.
        resumed: whether it went on from blocks of an earlier run.
    """
    if ended is not None and (ended.exit_code not in EXIT_CODES.values() or _read_error(ended)):
        # Not even where an earlier output is there, which this job did not come to replace.
        return _failed(job, ended, resumed)
    try:
        evidence = read_json(job.output / EVIDENCE)
        report = read_json(job.output / "report" / "report.json")
        artifacts = tuple(map(read_artifact, report["artifacts"]))
        timings = evidence["timings"]
        return JobOutcome(
            job,
            "kept" if ended is None else "finished",
            EXIT_CODES[report["verdict"]],
            None,
            report["verdict"],
            artifacts,
            _sum_stages(timings["seconds"]) if ended is None else ended.seconds,
            timings.get("peak_memory_bytes"),
            resumed,
            evidence,
            report["baseline"]["size_bytes"],
        )
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        if ended is None or ended.exit_code == 0:
            reason = (
                f"its report cannot be read ({type(error).__name__}: {error}): delete "
                f"{job.output} to make it again"
            )
            return JobOutcome(job, "failed", DEFECT, reason)
        return _failed(job, ended, resumed)


def _sum_stages(seconds: Mapping[str, float]) -> float:
    return sum(seconds.get(stage, 0.0) for stage in _STAGES)


def _failed(job: SweepJob, ended: Ended, resumed: bool) -> JobOutcome:
    """The outcome of a job without an output, with the reason that it gave."""
    code = ended.exit_code
    if code < 0:
        reason = _explain_signal(-code)
        code = NO_RESOURCES if -code == signal.SIGKILL else DEFECT
    else:
        reason = _read_error(ended) or ended.said.strip() or _last_words(job.log)
        code = code if code in WORST_FIRST else DEFECT
    return JobOutcome(job, "failed", code, reason, seconds=ended.seconds, resumed=resumed)


def _read_error(ended: Ended) -> str | None:
    """Return what `--json` says in place of a result where there is none."""
    try:
        return str(json.loads(ended.said)["error"])
    except (ValueError, KeyError, TypeError):
        return None


def _explain_signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL:
        return f"killed by {name}, by the system for want of memory if nobody else did it"
    return f"its process died of {name}"


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    words = [line for line in lines if line.strip()][-_LAST_LINES:]
    return " | ".join(words) or "it said nothing"


def find_exit_code(outcomes: Iterable[JobOutcome]) -> int:
    """Return the worst exit code of the jobs that have ended, by `WORST_FIRST`."""
    found = {outcome.exit_code for outcome in outcomes}
    return next((code for code in WORST_FIRST if code in found), 0)


def sort_outcomes(outcomes: Iterable[JobOutcome]) -> tuple[JobOutcome, ...]:
    """Put outcomes in the order of a table.

    Models stay in the order in which they were named. Of each, those that passed come first and
    among equal verdicts the smallest; then what failed, then what waits.
    """
    given = list(outcomes)
    models = list(dict.fromkeys(outcome.job.model for outcome in given))

    def place(outcome: JobOutcome) -> tuple[int, int, int]:
        model = models.index(outcome.job.model)
        if outcome.verdict is None:
            return model, len(_VERDICTS) + (outcome.state == "waiting"), 0
        return model, _VERDICTS.index(outcome.verdict), total_bytes(outcome)

    return tuple(sorted(given, key=place))


def total_bytes(outcome: JobOutcome) -> int:
    """Return the size of the largest artifact of a job: what its user has to live with."""
    return max((artifact.size_bytes for artifact in outcome.artifacts), default=0)


def evaluation_hash(outcome: JobOutcome) -> str | None:
    """Return the sha256 of the windows that a job was judged on."""
    found: Any = (outcome.evidence or {}).get("evaluation")
    return found.get("sha256") if isinstance(found, Mapping) else None
