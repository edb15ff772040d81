"""Only what passed and is unchanged is published, whatever its evidence claims."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import PublishError
from quantkit.publishing.checking import CheckedOutput, check_output
from quantkit.running import silent
from tests.publishing.outputs import edit_evidence

WEIGHTS = "compressed-tensors/model-00001-of-00003.safetensors"


def check(output: Path) -> CheckedOutput:
    return check_output(output, silent)


def test_an_output_that_passed_is_taken_with_all_its_files(passed: Path) -> None:
    """Sizes and hashes are those of the files on disk."""
    (artifact,) = check(passed).artifacts
    assert {file.path for file in artifact.files} == {
        path.name for path in artifact.folder.iterdir() if path.name != "README.md"
    }
    assert all(file.source.stat().st_size == file.size_bytes for file in artifact.files)
    assert check(passed).notes == ()


def flip_a_byte(output: Path) -> None:
    path = output / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_a_file(output: Path) -> None:
    path = output / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def link_a_file(output: Path) -> None:
    path = output / WEIGHTS
    shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def edit_one(output: Path, **changes: Any) -> None:
    """Change quantkit.json alone."""
    path = output / "quantkit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_row(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    evidence = json.loads((output / "quantkit.json").read_text())
    change(evidence["artifacts"][0])
    edit_evidence(output, artifacts=evidence["artifacts"])


def edit_report(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = output / "report" / "report.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def widen_an_interval(document: dict[str, Any]) -> None:
    document["artifacts"][0]["checks"][0]["high"] = 1e6


def fail_a_check_of_ones_own(document: dict[str, Any]) -> None:
    numbers = {"name": "own", "value": None, "limit": None, "verdict": "FAIL"}
    told = {"detail": "", "function": "checks.own", "sha256": None}
    document["artifacts"][0]["checks"].append({**numbers, "custom": told})


def fail_a_probe(document: dict[str, Any]) -> None:
    probe = {"name": "new_loops", "value": 3, "limit": 0, "verdict": "FAIL", "detail": ""}
    document["artifacts"][0]["probes"].append(probe)


def point_outside(row: dict[str, Any]) -> None:
    row["files"] = {"../../../etc/passwd": "0" * 64}


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed byte": (flip_a_byte, "is not the file that was judged: its sha256 differs"),
    "a file cut short": (cut_a_file, "is not the file that was judged"),
    "a missing file": (lambda output: (output / WEIGHTS).unlink(), "is a link or no file"),
    "a link": (link_a_file, "is a link or no file"),
    "a file more": (
        lambda output: (output / "compressed-tensors" / "extra.safetensors").write_bytes(b"x"),
        "extra.safetensors was not written by the job",
    ),
    "code beside": (
        lambda output: (output / "compressed-tensors" / "modeling_x.py").write_text(""),
        "modeling_x.py was not written by the job",
    ),
    "no evidence": (
        lambda output: (output / "quantkit.json").unlink(),
        "only outputs of `quantkit quantize` are published",
    ),
    "no report": (
        lambda output: (output / "report" / "report.json").unlink(),
        "has no evidence that can be read",
    ),
    "a FAIL": (lambda output: edit_evidence(output, verdict="FAIL"), "has the verdict FAIL"),
    "an INCONCLUSIVE": (
        lambda output: edit_evidence(output, verdict="INCONCLUSIVE"),
        "has the verdict INCONCLUSIVE",
    ),
    "an UNJUDGED": (
        lambda output: edit_evidence(output, verdict="UNJUDGED"),
        "has the verdict UNJUDGED",
    ),
    "a verdict of no kind": (
        lambda output: edit_evidence(output, verdict=["PASS"]),
        "which quantkit does not give",
    ),
    "a verdict that the report does not know": (
        lambda output: edit_one(output, verdict="FAIL"),
        "does not fit report/report.json",
    ),
    "other hashes than the report's": (
        lambda output: edit_one(output, artifacts=[]),
        "does not fit report/report.json",
    ),
    "a PASS beside figures that do not pass": (
        lambda output: edit_report(output, widen_an_interval),
        "does not follow from the checks",
    ),
    "a PASS without checks": (
        lambda output: edit_report(output, lambda d: d["artifacts"][0].update(checks=[])),
        "does not follow from the checks",
    ),
    "a PASS beside a check of one's own that failed": (
        lambda output: edit_report(output, fail_a_check_of_ones_own),
        "does not follow from the checks",
    ),
    "a PASS beside a probe that failed": (
        lambda output: edit_report(output, fail_a_probe),
        "does not follow from the checks",
    ),
    "no artifact": (lambda output: edit_evidence(output, artifacts=[]), "names no artifact"),
    "artifacts of no kind": (
        lambda output: edit_evidence(output, artifacts={"a": 1}),
        "names no artifact",
    ),
    "hashes of no kind": (
        lambda output: edit_row(output, lambda row: row.update(files={"a": 1})),
        "no hashes of files",
    ),
    "a name outside": (
        lambda output: edit_row(output, point_outside),
        "is no name for a published",
    ),
    "another artifact's name": (
        lambda output: edit_row(output, lambda row: row.update(name="other")),
        "name different artifacts",
    ),
    "a schema to come": (lambda output: edit_evidence(output, schema=9), "has schema 9"),
    "a report of no kind": (
        lambda output: edit_report(output, lambda document: document.update(artifacts=7)),
        "is not a report of a job",
    ),
    "evidence that is no JSON": (
        lambda output: (output / "quantkit.json").write_text("{"),
        "has no evidence that can be read",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_did_not_pass_or_has_changed_is_refused(name: str, output: Path) -> None:
    """In one line that says what is wrong."""
    spoil, words = CASES[name]
    spoil(output)
    with pytest.raises(PublishError, match=words) as caught:
        check(output)
    assert "\n" not in str(caught.value)


def test_a_part_of_an_output_names_the_whole(passed: Path) -> None:
    """The folder of the weights is what other commands take."""
    with pytest.raises(PublishError, match=f"quantkit publish {passed}"):
        check(passed / "compressed-tensors")


def test_a_report_of_the_gate_is_no_output(tmp_path: Path, passed: Path) -> None:
    """It has a PASS, and no hashes of what passed."""
    shutil.copytree(passed / "report", tmp_path / "model.gate")
    with pytest.raises(PublishError, match="a report of `quantkit gate`"):
        check(tmp_path / "model.gate")


def test_what_nobody_judged_stays_behind_and_is_named(output: Path) -> None:
    """Notes and pictures are harmless; they do not go."""
    (output / "compressed-tensors" / "notes.txt").write_text("mine")
    (output / "log.txt").write_text("mine")
    checked = check(output)
    assert "notes.txt" not in {file.path for file in checked.artifacts[0].files}
    assert [note.split()[0] for note in checked.notes] == [
        "compressed-tensors/notes.txt",
        "log.txt",
    ]


@pytest.mark.parametrize("name", [".gitattributes", ".git/config", "a\nb", "a/.hidden", "x" * 300])
def test_odd_names_are_refused(name: str, output: Path) -> None:
    """The Hub gives some of them a meaning, and others cannot be shown."""
    edit_row(output, lambda row: row["files"].update({name: "0" * 64}))
    with pytest.raises(PublishError, match="which is no name for a published file"):
        check(output)
