"""junit.xml: the gate as a test run, for CI systems that show those."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from quantkit.records import ArtifactReport, Report, Verdict
from quantkit.report.rows import CheckRow, check_rows
from quantkit.report.text import clean, clean_line


def render_junit(report: Report) -> str:
    """Return one test suite an artifact and in it one case a check, then one named `verdict`.

    FAIL and INCONCLUSIVE are both a `failure`, told apart by its `type`: what is not proven must
    not look green. UNJUDGED is `skipped`. The case `verdict` carries the reasons, among them those
    that belong to no check.
    """
    root = ET.Element("testsuites", name=f"quantkit: {clean_line(report.model)}")
    for artifact in report.artifacts:
        _add_suite(root, artifact)
    if not report.artifacts:
        suite = ET.SubElement(root, "testsuite", name="quantkit")
        _add_case(suite, "quantkit", "verdict", report.verdict, "there is no artifact", "")
    for element in (*root, root):
        element.set("tests", str(len(list(element.iter("testcase")))))
        element.set("failures", str(len(list(element.iter("failure")))))
        element.set("errors", "0")
        element.set("skipped", str(len(list(element.iter("skipped")))))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_suite(root: ET.Element, artifact: ArtifactReport) -> None:
    judgement = artifact.judgement
    name = clean_line(artifact.name)
    suite = ET.SubElement(root, "testsuite", name=name)
    _add_properties(suite, artifact)
    for row in check_rows(judgement):
        words = f"{row.label} {row.value} ({row.interval}), {row.limit}"
        _add_case(suite, name, row.check.name, row.verdict, words, _numbers(row))
    reasons = "\n".join(judgement.reasons)
    message = judgement.reasons[0] if judgement.reasons else judgement.verdict
    _add_case(suite, name, "verdict", judgement.verdict, message, reasons)


def _add_properties(suite: ET.Element, artifact: ArtifactReport) -> None:
    """What was measured besides the checks: the figures of an encoder, and speeds."""
    judgement = artifact.judgement
    figures = {each.name: f"{each.metric.value!r}" for each in judgement.measures}
    for speed in judgement.speed:
        words = f"{speed.unit} per second, {speed.what}"
        figures |= {f"baseline: {words}": f"{speed.baseline!r}", words: f"{speed.artifact!r}"}
    if figures:
        properties = ET.SubElement(suite, "properties")
        for name, value in figures.items():
            ET.SubElement(properties, "property", name=clean_line(name), value=value)


def _add_case(
    suite: ET.Element, group: str, name: str, verdict: Verdict, message: str, detail: str
) -> None:
    case = ET.SubElement(suite, "testcase", classname=group, name=clean_line(name))
    if verdict in ("FAIL", "INCONCLUSIVE"):
        failure = ET.SubElement(case, "failure", type=verdict, message=clean_line(message))
        failure.text = clean(detail) or None
    elif verdict == "UNJUDGED":
        ET.SubElement(case, "skipped", message=clean_line(message))


def _numbers(row: CheckRow) -> str:
    check = row.check
    return f"limit {check.limit!r}\nvalue {check.value!r}\ninterval {check.low!r} {check.high!r}"
