"""What a folder holds, in a form in which two runs of one job are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_TIMED = ("timings", "measured_with")
"""Of the evidence: how long things took, and what had which version."""
_MEASURED = ("name", "path", "format", "scheme", "size_bytes", "metrics", "checks", "verdict")
"""Of an artifact in report.json: what does not depend on the time."""

UNFINISHED = ("lock", "workspace")
"""What a job that was killed at its last steps has still in its output."""


def settle(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder; names of empty folders too.

    Reports tell how long things took: of report.json that is left out, of the others it is looked
    at whether they are whole.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = b"a link"
        elif path.is_file():
            found[name] = _settle_file(path)
        elif not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found


def settle_output(folder: Path) -> dict[str, bytes] | None:
    """As `settle`, without what the next command removes; None where there is no folder."""
    if not folder.is_dir():
        return None
    return {
        name: data
        for name, data in settle(folder).items()
        if name.rstrip("/").split("/")[0] not in UNFINISHED
    }


def _settle_file(path: Path) -> bytes:
    data = path.read_bytes()
    if "baselines" in path.parts:
        # Of a kept answer the day and the hashes of all of it are in the document.
        return b"kept" if path.name == "answer.json" else data
    try:
        if path.name == "quantkit.json":
            return _without_times(json.loads(data))
        if path.name == "report.json":
            return _dump(_settle_report(json.loads(data)))
        if path.name == "statistics.json":
            return _without_times(json.loads(data))
        if path.name == "junit.xml":
            ElementTree.fromstring(data)
            return b"whole"
        if path.name == "report.html":
            return b"whole" if data.rstrip().endswith(b"</html>") else b"torn"
        if path.name == "report.md":
            return b"whole" if data.rstrip().endswith(b"</details>") else b"torn"
    except (ValueError, ElementTree.ParseError):
        return b"torn"
    return data


def _without_times(document: dict[str, Any]) -> bytes:
    return _dump({key: value for key, value in document.items() if key not in _TIMED})


def _settle_report(document: dict[str, Any]) -> dict[str, Any]:
    return {
        "verdict": document["verdict"],
        "artifacts": [{key: row[key] for key in _MEASURED} for row in document["artifacts"]],
    }


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
