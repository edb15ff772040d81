"""Text that tries to get out of every format that a report is written in."""

from __future__ import annotations

from dataclasses import replace

from quantkit.records import Report
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
