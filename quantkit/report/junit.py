"""junit.xml: the gate as a test run, for CI systems that show those."""

from __future__ import annotations

from dataclasses import asdict
from xml.etree import ElementTree as ET

from quantkit.records import ArtifactReport, Report, Verdict
from quantkit.report.custom import custom_rows, custom_sentence
from quantkit.report.probes import probe_rows, probe_sentence, task_rows, task_sentence
from quantkit.report.rows import CheckRow, check_rows
from quantkit.report.text import clean, clean_line


def render_junit(report: Report) -> str:
    """Return one test suite an artifact and in it one case a check, then one named `verdict`.

    Probes (`probe.NAME`) and tasks (`task.NAME`) that have a limit are cases too, as checks are,
    and so are the user's own checks (`custom.NAME`).

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
    for check in check_rows(judgement):
        words = f"{check.label} {check.value} ({check.interval}), {check.limit}"
        _add_case(suite, name, check.check.name, check.verdict, words, _numbers(check))
    for probe in (row for row in probe_rows(artifact) if row.is_judged):
        numbers = f"limit {probe.probe.limit!r}\nvalue {probe.probe.value!r}\n{probe.detail}"
        title = f"probe.{probe.probe.name}"
        _add_case(suite, name, title, probe.verdict, probe_sentence(probe), numbers)
    for row in (row for row in task_rows(artifact) if row.is_judged):
        task = row.task
        numbers = f"limit {task.limit!r}\nrecovery {task.recovery!r}\n"
        numbers += f"interval {task.low!r} {task.high!r}"
        _add_case(suite, name, f"task.{task.name}", row.verdict, task_sentence(row), numbers)
    for own in custom_rows(artifact):
        numbers = f"limit {own.check.limit!r}\nvalue {own.check.value!r}\n{own.detail}"
        _add_case(suite, name, f"custom.{own.label}", own.verdict, custom_sentence(own), numbers)
    reasons = "\n".join(judgement.reasons)
    message = judgement.reasons[0] if judgement.reasons else judgement.verdict
    _add_case(suite, name, "verdict", judgement.verdict, message, reasons)


def _add_properties(suite: ET.Element, artifact: ArtifactReport) -> None:
    """What was measured besides the checks: further figures, speeds, and what running takes."""
    judgement = artifact.judgement
    figures = {each.name: f"{each.metric.value!r}" for each in judgement.measures}
    if judgement.details is not None:
        details = judgement.details
        figures["reverse_kl"] = repr(details.reverse_kl.value)
        figures["top5_agreement"] = repr(details.top5_agreement.value)
        figures["flips"] = repr(details.flips.value)
    if judgement.footprint is not None:
        found = asdict(judgement.footprint)
        figures |= {key: str(value) for key, value in found.items() if value is not None}
    for speed in judgement.speed:
        words = f"{speed.unit} per second, {speed.what}"
        figures |= {f"baseline: {words}": f"{speed.baseline!r}", words: f"{speed.artifact!r}"}
    if figures:
        properties = ET.SubElement(suite, "properties")
        for name, value in figures.items():
            ET.SubElement(properties, "property", name=clean_line(name), value=clean_line(value))


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
