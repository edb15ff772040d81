"""A probe's value and its limit: what follows (docs/gate.md, "Probes")."""

from __future__ import annotations

from quantkit.records.measuring import Probe
from quantkit.records.metrics import Verdict


def judge_probe(name: str, value: float | None, limit: float | None, detail: str) -> Probe:
    """Return the probe: PASS up to its limit, UNJUDGED without a value or a limit."""
    verdict: Verdict = "UNJUDGED"
    if value is not None and limit is not None:
        verdict = "PASS" if value <= limit else "FAIL"
    return Probe(name, value, limit, verdict, detail)


def fail_probe(name: str, limit: float | None, detail: str) -> Probe:
    """Return a probe that has no number since the models gave none; FAIL where it has a limit."""
    return Probe(name, None, limit, "UNJUDGED" if limit is None else "FAIL", detail)
