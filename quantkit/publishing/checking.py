"""Is an output what its evidence says, and did it pass? Nothing of it is taken on trust.

Evidence is somebody's bytes as much as the weights are: it is bounded, its shape is looked at, its
two copies must agree, each verdict must follow from the figures beside it, and every file is hashed
again.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CheckpointError, PublishError
from quantkit.judging.checks import compare_limit
from quantkit.records import Event, Metric, Progress, Report
from quantkit.report.reading import read_report
from quantkit.report.schema import SCHEMA

EVIDENCE = "quantkit.json"
REPORT = "report/report.json"
CARD = "README.md"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_FILES = 10_000
_LONGEST_NAME = 255
WEIGHTS = frozenset(
    {".safetensors", ".gguf", ".onnx", ".data", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5"}
)
"""What a runtime might load instead of, or beside, what was judged."""
CODE = frozenset({".py", ".so", ".dll", ".dylib", ".pickle", ".pkl"})
_REMEDY = "quantize again, or publish another output"


@dataclass(frozen=True)
class CheckedFile:
    """A file that is the one that was judged."""

    path: str
    """Relative to the artifact's folder."""
    source: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckedArtifact:
    """An artifact of an output, whose files are the ones that were judged."""

    name: str
    format: str
    path: str
    """Its folder, relative to the output."""
    folder: Path
    files: tuple[CheckedFile, ...]


@dataclass(frozen=True)
class CheckedOutput:
    """An output that passed and is unchanged since."""

    folder: Path
    evidence: Mapping[str, Any]
    document: Mapping[str, Any]
    """Of report.json."""
    report: Report
    artifacts: tuple[CheckedArtifact, ...]
    notes: tuple[str, ...]
    """What lies in the folder and stays there."""


def check_output(folder: Path, tell: Progress) -> CheckedOutput:
    """Return what may be published of the output in `folder`.

    Raises:
        PublishError: it has no evidence, did not pass, is not what was judged, or holds something
            that must not go along.
    """
    evidence, document = read_verdict(folder)
    report = _read_report(document, folder)
    check_verdicts(report, str(folder))
    rows = list_artifacts(evidence, str(folder / EVIDENCE))
    _match_rows(rows, report, folder)
    total = sum(len(row["files"]) for row in rows)
    done = 0
    tell(Event("check", 0, total, "hashing every file again"))

    def count(name: str) -> None:
        nonlocal done
        done += 1
        tell(Event("check", done, total, name))

    artifacts = tuple(_check_artifact(folder, row, count) for row in rows)
    notes = [note for artifact in artifacts for note in _list_strangers(artifact, artifacts)]
    return CheckedOutput(
        folder,
        evidence,
        document,
        report,
        artifacts,
        (*notes, *_list_beside(folder, artifacts)),
    )


def read_verdict(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return quantkit.json and report.json of an output that they say has passed.

    Raises:
        PublishError: there is no such output, or it did not pass, or the two disagree.
    """
    _find_output(folder)
    try:
        evidence = read_json(join_inside(folder, EVIDENCE))
        document = read_json(join_inside(folder, REPORT))
    except CheckpointError as error:
        raise PublishError(f"{folder} has no evidence that can be read: {error}") from None
    check_agreement(evidence, document, str(folder))
    return evidence, document


def check_agreement(evidence: Mapping[str, Any], document: Mapping[str, Any], where: str) -> None:
    """Refuse a verdict other than PASS, and a quantkit.json that does not fit its report.json.

    Args:
        where: the folder or repository that both are of.

    Raises:
        PublishError: one of them.
    """
    for name, found, known in ((EVIDENCE, evidence, 1), (REPORT, document, SCHEMA)):
        if found.get("schema") != known:
            raise PublishError(
                f"{where}: {name} has schema {found.get('schema')!r:.40}, and this quantkit reads "
                f"{known}: use the quantkit that wrote it"
            )
    verdict = document.get("verdict")
    if verdict != evidence.get("verdict") or document.get("evidence") != _plain(evidence):
        raise PublishError(
            f"{where}: {EVIDENCE} does not fit {REPORT}: one of them was changed after the gate; "
            f"{_REMEDY}"
        )
    if verdict != "PASS":
        raise PublishError(_refuse_verdict(where, verdict))


def _refuse_verdict(where: str, verdict: object) -> str:
    remedies = {
        "FAIL": "its report says why, and `quantkit bisect` finds which layers cost it",
        "INCONCLUSIVE": "its report says how many more windows would decide",
        "UNJUDGED": "quantize it with a gate, without --no-gate",
    }
    known = verdict if isinstance(verdict, str) and verdict in remedies else None
    if known is None:
        return f"{where} has the verdict {verdict!r:.40}, which quantkit does not give: {_REMEDY}"
    return f"{where} has the verdict {known} and is not published: {remedies[known]}"


def _find_output(folder: Path) -> None:
    """Refuse what is no output of `quantkit quantize`, and say what it seems to be."""
    if not folder.exists():
        raise PublishError(f"{folder}: there is no such folder")
    place = folder if folder.is_dir() else folder.parent
    if folder.is_dir() and (folder / EVIDENCE).is_file():
        return
    # Only for the refusal: it takes torch along, which nothing else here needs.
    from quantkit.formats.inspect import find_evidence

    found = find_evidence(place)
    if found is not None:
        raise PublishError(
            f"{folder} is a part of an output: publish all of it, `quantkit publish {found.parent}`"
        )
    if (place / "report.json").is_file():
        raise PublishError(
            f"{folder} holds a report of `quantkit gate`, which records no hashes of the files: "
            f"only outputs of `quantkit quantize` that passed are published"
        )
    raise PublishError(
        f"{folder} has no {EVIDENCE}, so nothing says what its files are and whether they passed: "
        f"only outputs of `quantkit quantize` are published"
    )


def _plain(value: Any) -> Any:
    """As report.json has it, whose numbers are finite or null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _read_report(document: Mapping[str, Any], folder: Path) -> Report:
    try:
        return read_report(document)
    except ValueError as error:
        raise PublishError(
            f"{folder / REPORT} is not a report of a job ({error}): {_REMEDY}"
        ) from None


def check_verdicts(report: Report, where: str) -> None:
    """Refuse a PASS that does not follow from the figures beside it.

    Raises:
        PublishError: it does not.
    """
    if not report.artifacts:
        raise PublishError(f"{where}: {REPORT} names no artifact; {_REMEDY}")
    for row in report.artifacts:
        judgement = row.judgement
        asked = [task for task in judgement.tasks if task.limit is not None]
        try:
            within = all(
                check.verdict == "PASS"
                and compare_limit(
                    check.name, check.limit, Metric(check.value, check.low, check.high)
                )
                == "PASS"
                for check in judgement.checks
            )
        except (TypeError, AttributeError):
            within = False
        proven = (
            judgement.verdict == "PASS"
            and within
            and bool(judgement.checks or asked)
            and all(task.verdict == "PASS" for task in asked)
            and all(probe.verdict != "FAIL" for probe in judgement.probes)
            and all(check.verdict == "PASS" for check in judgement.custom_checks)
        )
        if not proven:
            raise PublishError(
                f"{where}: the PASS of {row.name!r:.80} does not follow from the checks in "
                f"{REPORT}; {_REMEDY}"
            )


def list_artifacts(evidence: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the artifacts that evidence names, after a look at the shape of what it says.

    Raises:
        PublishError: it is not the evidence of a job.
    """
    rows = evidence.get("artifacts")
    if not isinstance(rows, list) or not rows:
        raise PublishError(f"{where} names no artifact: only outputs of a job are published")
    for row in rows:
        files = row.get("files") if isinstance(row, dict) else None
        if (
            not isinstance(files, dict)
            or not 0 < len(files) <= _MOST_FILES
            or not all(isinstance(row.get(key), str) for key in ("name", "path", "format"))
            or not all(
                isinstance(value, str) and _SHA256.fullmatch(value) for value in files.values()
            )
        ):
            raise PublishError(f"{where}: its artifacts have no hashes of files that can be read")
        odd = next((name for name in (row["path"], *files) if not _is_plain(name)), None)
        if odd is not None:
            raise PublishError(f"{where} names {odd!r:.100}, which is no name for a published file")
    return rows


def _is_plain(name: str) -> bool:
    """Whether a name is printable and hides nothing; a dot alone is where the evidence lies."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return name.isprintable() and (name == "." or not hidden) and len(name) <= _LONGEST_NAME


def _match_rows(rows: Sequence[Mapping[str, Any]], report: Report, folder: Path) -> None:
    """Refuse evidence about other artifacts than the report's."""
    keys = ("name", "path", "format")
    named = [tuple(row[key] for key in keys) for row in rows]
    if named != [tuple(getattr(row, key) for key in keys) for row in report.artifacts]:
        raise PublishError(
            f"{folder / EVIDENCE} and {folder / REPORT} name different artifacts: {_REMEDY}"
        )


def _check_artifact(
    output: Path, row: Mapping[str, Any], count: Callable[[str], None]
) -> CheckedArtifact:
    """Hash all files of an artifact again.

    Raises:
        PublishError: one is missing, is a link, or is not the one that was judged.
    """
    try:
        folder = join_inside(output, row["path"])
        files = []
        for name, digest in sorted(row["files"].items()):
            path = join_inside(folder, name)
            files.append(CheckedFile(name, path, *_hash(path, digest)))
            count(name)
    except CheckpointError as error:
        raise PublishError(f"a file that the evidence names is refused: {error}") from None
    return CheckedArtifact(row["name"], row["format"], row["path"], folder, tuple(files))


def _hash(path: Path, recorded: str) -> tuple[int, str]:
    """Return size and sha256 of a file that has the recorded one."""
    if path.is_symlink() or not path.is_file():
        raise PublishError(f"{path} is a link or no file: copy the file itself there")
    try:
        with path.open("rb") as handle:
            actual = hashlib.file_digest(handle, "sha256").hexdigest()
            size = handle.tell()
    except OSError as error:
        raise PublishError(f"cannot read {path}: {error.strerror or error}") from None
    if actual != recorded:
        raise PublishError(
            f"{path} is not the file that was judged: its sha256 differs from the one in "
            f"{EVIDENCE}; {_REMEDY}"
        )
    return size, actual


def _list_strangers(artifact: CheckedArtifact, others: Sequence[CheckedArtifact]) -> list[str]:
    """Say which files of an artifact's folder stay behind.

    Raises:
        PublishError: there are weights, code or links that nobody has judged, or the card is a link
            or no file.
    """
    card = artifact.folder / CARD
    # What it says of the terms is published.
    if card.is_symlink() or (card.exists() and not card.is_file()):
        raise PublishError(f"{card} is a link or no file: copy the file itself there, or remove it")
    known = {file.source for file in artifact.files} | {card}
    known |= {file.source for other in others for file in other.files}
    known |= {other.folder / CARD for other in others}
    notes = []
    for path in sorted(artifact.folder.rglob("*")):
        if path in known or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or path.suffix.lower() in WEIGHTS | CODE:
            raise PublishError(
                f"{path} was not written by the job, and a runtime might load it: remove it, or "
                f"{_REMEDY}"
            )
        notes.append(f"{path.relative_to(artifact.folder.parent)} was not judged and stays behind")
    return notes


def _list_beside(output: Path, artifacts: Sequence[CheckedArtifact]) -> list[str]:
    """Say what else lies in the output's folder, which stays behind."""
    ours = {EVIDENCE, "report", *(artifact.path.split("/")[0] for artifact in artifacts)}
    return [
        f"{path.name} beside the artifact was not judged and stays behind"
        for path in sorted(output.iterdir())
        if path.name not in ours
    ]
