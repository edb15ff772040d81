"""Ask PyPI which published vulnerabilities the locked versions have.

    audit.py PIP_AUDIT LOCK...   PIP_AUDIT is the program; LOCKs are files of locks/

pip-audit asks PyPI for each version. Mirrors that have no page for each version make it skip
packages, which it calls no findings: those are looked up on the package's own page, which tells of
its newest version. What nobody answers for is said to be NOT CHECKED, and is no failure: without a
network there is nothing to ask. A finding is one, unless known_holes.toml has it for today.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pins import Pin, read_pins

PYPI = "https://pypi.org/pypi"
KNOWN = Path(__file__).with_name("known_holes.toml")
_SECONDS = 30
_CONNECTIONS = 8
_NAMED = 12
"""Packages that are named where many were not checked."""


@dataclass(frozen=True)
class Finding:
    """A vulnerability of a locked version."""

    pin: Pin
    ids: tuple[str, ...]
    """Of every list that has it."""
    fixed: tuple[str, ...]


def main(program: str, locks: list[Path]) -> int:
    """Print what was found, and what nobody could say."""
    pins = sorted(
        {(pin.key, pin.version): pin for lock in locks for pin in read_pins(lock)}.items()
    )
    everything = [pin for _, pin in pins]
    findings: list[Finding] = []
    unanswered = everything
    if has_page_of_versions(everything[0]):
        findings, unanswered = run_pip_audit(program, everything)
    more, unchecked = ask_pages(unanswered)
    faults = judge([*findings, *more], today=datetime.now(UTC).date())
    for fault in faults:
        print(f"audit: {fault}", file=sys.stderr)
    if unchecked:
        names = ", ".join(f"{pin.name} {pin.version}" for pin in unchecked[:_NAMED])
        rest = "" if len(unchecked) <= _NAMED else f" and {len(unchecked) - _NAMED} more"
        print(f"audit: NOT CHECKED: no answer about {names}{rest}", file=sys.stderr)
    checked = len(everything) - len(unchecked)
    print(f"audit: {checked} of {len(everything)} versions checked, {len(faults)} to mend")
    return 1 if faults else 0


def has_page_of_versions(pin: Pin) -> bool:
    """Whether the index tells of single versions, as PyPI itself does."""
    return _ask(f"{PYPI}/{pin.key}/{pin.version}/json") is not None


def run_pip_audit(program: str, pins: Iterable[Pin]) -> tuple[list[Finding], list[Pin]]:
    """Return what pip-audit found, and what it could not look up.

    Raises:
        RuntimeError: it failed otherwise.
    """
    by_name = {pin.key: pin for pin in pins}
    # One version of a package at a time, as in an environment: others are left to their own page.
    left = [pin for pin in pins if by_name[pin.key] is not pin]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.txt")
        file.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in by_name.values()))
        command = [program, "--requirement", str(file), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print(f"audit: pip-audit said nothing: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return [], list(pins)
    findings = []
    for answer in answers:
        if "skip_reason" in answer:
            left.append(by_name[answer["name"]])
        for hole in answer.get("vulns", []):
            ids = (hole["id"], *hole["aliases"])
            findings.append(Finding(by_name[answer["name"]], ids, tuple(hole["fix_versions"])))
    return findings, left


def ask_pages(pins: list[Pin]) -> tuple[list[Finding], list[Pin]]:
    """Return what the packages' own pages tell, and those that tell of another version."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        pages = list(pool.map(lambda pin: _ask(f"{PYPI}/{pin.key}/json"), pins))
    findings, unchecked = [], []
    for pin, page in zip(pins, pages, strict=True):
        if page is None or page["info"]["version"] != pin.version:
            unchecked.append(pin)
            continue
        for hole in page["vulnerabilities"]:
            if not hole.get("withdrawn"):
                ids = (hole["id"], *hole["aliases"])
                findings.append(Finding(pin, ids, tuple(hole["fixed_in"])))
    return findings, unchecked


def _ask(address: str) -> dict[str, Any] | None:
    """Return a JSON document, or None where the server does not have it or is not reached."""
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def judge(findings: Iterable[Finding], today: date) -> list[str]:
    """Return a line for each finding that is not known, or no longer accepted."""
    known = {
        (entry["package"], entry["id"]): entry
        for entry in tomllib.loads(KNOWN.read_text(encoding="utf-8")).get("known", [])
    }
    faults = {}
    for finding in findings:
        pin = finding.pin
        entries = [known[pin.key, one] for one in finding.ids if (pin.key, one) in known]
        if any(entry["until"] >= today for entry in entries):
            continue
        over = "; no longer accepted" if entries else ""
        mend = f"fixed in {', '.join(finding.fixed)}" if finding.fixed else "no release mends it"
        ids = sorted(finding.ids)
        faults[pin.key, ids[0]] = f"{pin.name} {pin.version}: {', '.join(ids)}: {mend}{over}"
    return [faults[key] for key in sorted(faults)]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], [Path(name) for name in sys.argv[2:]]))
