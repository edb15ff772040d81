"""Read what a wheel asks for: a script, run by an environment's interpreter, whose pip it uses.

    wheel_metadata.py needs CONSTRAINTS FOLDER   what the one wheel in FOLDER asks for, one
        requirement a line, less torch and what the constraints do not name
    wheel_metadata.py build REPORT               `cpu` or `cuda`: the build of torch that pip's
        report (`--dry-run --report`) would install
    wheel_metadata.py version REPORT             the version that it would install

Parts of quantkit that are not in the environment cannot be imported here.
"""

from __future__ import annotations

import email.parser
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from pip._vendor.packaging.requirements import Requirement


def main(what: str, *arguments: str) -> None:
    """Print the answer to one question."""
    for line in QUESTIONS[what](*map(Path, arguments)):
        sys.stdout.write(f"{line}\n")


def find_needs(constraints: Path, folder: Path) -> list[str]:
    """Return the requirements of the wheel in `folder` that apply here and are pinned."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pinned = {_canonical(line.partition("==")[0]) for line in lines if "==" in line}
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    lines = metadata.get_all("Requires-Dist", [])
    return [line for line in lines if _applies(line) in pinned - {"torch"}]


def find_build(report: Path) -> list[str]:
    """Return which build of torch the report is about: one without CUDA's libraries is `cpu`."""
    metadata = json.loads(report.read_bytes())["install"][0]["metadata"]
    names = {_applies(line) for line in metadata.get("requires_dist", [])}
    cuda = any(name is not None and name.startswith(("nvidia-", "cuda-")) for name in names)
    return ["cuda" if cuda and not metadata["version"].endswith("+cpu") else "cpu"]


def find_version(report: Path) -> list[str]:
    """Return the version that the report is about, with its local part: 2.13.0+cpu."""
    return [json.loads(report.read_bytes())["install"][0]["metadata"]["version"]]


def _applies(line: str) -> str | None:
    """The name of the required package, or None where its marker is not true here."""
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return None
    return _canonical(requirement.name)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


QUESTIONS: Mapping[str, Callable[..., list[str]]] = MappingProxyType(
    {"needs": find_needs, "build": find_build, "version": find_version}
)

if __name__ == "__main__":
    main(*sys.argv[1:])
