"""Text that tries to get out of every format that a report is written in."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from quantkit.records import EXIT_CODES, Report
from tests.report.measured import make_comparison
from tests.report.sample import make_report

HOSTILE = (
    "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\"'|`</style></pre>\n"
    "---\nlicense: stolen\n]]> ```` {{ 7*7 }} {% x %} &amp; $x$ @everyone [x](http://evil.example) "
    "\x00\x1b\ud800\u202e"
)


def make_hostile_report() -> Report:
    """Return a FAIL whose every text is hostile."""
    report = make_report("FAIL", model=HOSTILE, name=HOSTILE, blocks=2, fallback=HOSTILE)
    (artifact,) = report.artifacts
    judgement = artifact.judgement
    checks = tuple(replace(check, name=check.name + HOSTILE) for check in judgement.checks)
    artifact = replace(
        artifact,
        path=HOSTILE,
        format=HOSTILE,
        scheme=HOSTILE,
        runtime=HOSTILE,
        judgement=replace(judgement, reasons=(HOSTILE,), checks=checks),
    )
    layers = tuple(
        replace(layer, name=layer.name + HOSTILE, scheme=HOSTILE, method=HOSTILE)
        for layer in report.layers
    )
    evidence = {HOSTILE: HOSTILE, "recipe": HOSTILE, "deep": {HOSTILE: [HOSTILE, {"x": HOSTILE}]}}
    return replace(
        report, artifacts=(artifact,), layers=layers, notes=(HOSTILE,), evidence=evidence
    )


def make_hostile_comparison() -> Report:
    """Return a comparison with everything that a gate measures, its every text hostile."""
    return replace(poison(make_comparison()), evidence={})


def poison(value: Any) -> Any:
    """Append to every text of a record but verdicts, which are not made by strangers."""
    if isinstance(value, str):
        return value if value in EXIT_CODES else value + HOSTILE
    if isinstance(value, tuple):
        return tuple(map(poison, value))
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: poison(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **found)
    return value
