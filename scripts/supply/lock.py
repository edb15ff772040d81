"""Write locks/*.txt: the versions of constraints*.txt with the SHA-256 of their files.

    lock.py            ask the package index for the hashes of every version, and write the locks
    lock.py --check    compare the locks with constraints*.txt, without a network
    lock.py --compare  compare the locks with what the package index says today

A lock is a constraints file for pip, which then installs nothing that has no hash in it. It holds
every file of a version that the supported Pythons and systems could take, so that one lock serves
all of them. The index is that of $PIP_INDEX_URL, by default PyPI; hashes of torch's CPU builds come
from $QUANTKIT_TORCH_INDEX, by default PyTorch's own; where that is not reached, those that
locks/torch-cpu.sha256 has stay, and it is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.utils import parse_sdist_filename, parse_wheel_filename
from packaging.version import Version
from pins import CPU_BUILDS, LOCKS, ROOT, Pin, canonical, constraints, read_pins

INDEX = "https://pypi.org/simple"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ("311", "312", "313")
_JSON = "application/vnd.pypi.simple.v1+json"
_SECONDS = 60
_CONNECTIONS = 8
_PLATFORM = re.compile(
    r"any|(many|musl)?linux.*_(x86_64|aarch64)|macosx_.*_(x86_64|arm64|universal2?)"
)
_CPU_BUILD = re.compile(r'href="[^"]*/(torch-[^"#]*\.whl)#sha256=([0-9a-f]{64})"')


def main() -> int:
    """Write, check or compare; 0 when all agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--check", action="store_true", help="compare with constraints*.txt only")
    kind.add_argument("--compare", action="store_true", help="compare with the package index")
    arguments = parser.parse_args()
    if arguments.check:
        return _tell(check_locks())
    pins = {(pin.key, pin.version) for path in constraints() for pin in read_pins(path)}
    offered = ask_index(sorted(pins))
    if arguments.compare:
        return _tell(check_locks() + compare_locks(offered))
    builds = ask_cpu_builds(next(version for name, version in pins if name == "torch"))
    CPU_BUILDS.write_text(
        "".join(f"{digest}  {file}\n" for file, digest in sorted(builds.items())), encoding="utf-8"
    )
    for path in constraints():
        write_lock(path, offered, builds)
    return _tell(check_locks())


def _tell(faults: list[str]) -> int:
    for fault in faults:
        print(f"locks: {fault}", file=sys.stderr)
    if not faults:
        print(f"locks: {len(constraints())} files, all versions and hashes agree")
    return 1 if faults else 0


def check_locks() -> list[str]:
    """Return what the locks have otherwise than constraints*.txt, or lack."""
    faults = []
    for path in constraints():
        lock = LOCKS / path.name
        if not lock.is_file():
            faults.append(f"{lock.name} is missing: run scripts/supply/lock.py")
            continue
        wanted = {(pin.name, pin.version) for pin in read_pins(path)}
        locked = read_pins(lock)
        differing = wanted ^ {(pin.name, pin.version) for pin in locked}
        faults += [
            f"{lock.name}: {name} {version} is in one of it and {path.name} only"
            for name, version in sorted(differing)
        ]
        faults += [f"{lock.name}: {pin.name} has no hash" for pin in locked if not pin.hashes]
    return faults


def compare_locks(offered: Mapping[tuple[str, str], Mapping[str, str]]) -> list[str]:
    """Return the hashes of the locks that the index does not list for that version."""
    builds = {line.split()[0] for line in CPU_BUILDS.read_text(encoding="utf-8").splitlines()}
    faults = []
    for path in constraints():
        for pin in read_pins(LOCKS / path.name):
            listed = set(offered[pin.key, pin.version].values())
            unknown = set(pin.hashes) - listed - (builds if pin.key == "torch" else set())
            faults += [f"{path.name}: {pin.name}: the index lacks {one}" for one in sorted(unknown)]
    return faults


def ask_index(pins: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """Return, for each (name, version), file name -> sha256 of what can be installed here.

    Raises:
        ValueError: the index has no file of a version.
    """
    names = sorted({name for name, _ in pins})
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        pages = dict(zip(names, pool.map(_ask_page, names), strict=True))
    found = {}
    for name, version in pins:
        files = {
            entry["filename"]: entry["hashes"]["sha256"]
            for entry in pages[name]["files"]
            if is_for_us(entry["filename"], version)
        }
        if not files:
            raise ValueError(f"the index has no file of {name} {version}")
        found[name, version] = files
    return found


def _ask_page(name: str) -> Any:
    index = os.environ.get("PIP_INDEX_URL", INDEX).rstrip("/")
    request = urllib.request.Request(f"{index}/{name}/", headers={"Accept": _JSON})
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return json.load(answer)


def is_for_us(file: str, version: str) -> bool:
    """Whether a file is of this version, and for a Python and a system that quantkit runs on."""
    if not file.endswith(".whl"):
        if not file.endswith((".tar.gz", ".zip")):
            return False
        try:
            return parse_sdist_filename(file)[1] == Version(version)
        except ValueError:
            return False
    try:
        _, found, _, tags = parse_wheel_filename(file)
    except ValueError:
        return False
    # 2.13.0+cpu is a build of 2.13.0.
    if Version(found.public) != Version(version):
        return False
    return any(
        _PLATFORM.fullmatch(tag.platform) and _runs(tag.interpreter, tag.abi) for tag in tags
    )


def _runs(interpreter: str, abi: str) -> bool:
    """Whether one of PYTHONS takes a wheel of these tags."""
    if abi == "none":
        return interpreter.startswith("py3") or interpreter[2:] in ("3", *PYTHONS)
    if abi == "abi3":
        return interpreter.startswith("cp3") and int(interpreter[3:] or 0) <= int(PYTHONS[-1][1:])
    return interpreter.startswith("cp") and interpreter[2:] in PYTHONS and abi == interpreter


def ask_cpu_builds(version: str) -> dict[str, str]:
    """Return file name -> sha256 of torch's CPU builds; those known where no index is reached.

    Raises:
        ValueError: the index is not reached, and none of this version is known.
    """
    index = os.environ.get("QUANTKIT_TORCH_INDEX", CPU_INDEX).rstrip("/")
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=_SECONDS) as answer:
            page = unquote(answer.read().decode())
        builds = dict(_CPU_BUILD.findall(page))
        source = index
    except OSError as error:
        print(f"locks: NOT RENEWED: hashes of torch's CPU builds: {error}", file=sys.stderr)
        lines = CPU_BUILDS.read_text(encoding="utf-8").splitlines()
        builds = {file: digest for digest, file in map(str.split, lines)}
        source = str(CPU_BUILDS.relative_to(ROOT))
    kept = {file: digest for file, digest in builds.items() if is_for_us(file, version)}
    if not kept:
        raise ValueError(f"{source} has no CPU build of torch {version}")
    return kept


def write_lock(
    path: Path, offered: Mapping[tuple[str, str], Mapping[str, str]], builds: Mapping[str, str]
) -> None:
    """Write the lock of one constraints file."""
    lines = [
        f"# The versions of {path.name} with the SHA-256 of their files, for `pip install -c`:",
        "# made by scripts/supply/lock.py, see docs/supply.md.",
    ]
    for pin in read_pins(path):
        hashes = set(offered[pin.key, pin.version].values())
        if canonical(pin.name) == "torch":
            hashes |= set(builds.values())
        written = Pin(pin.name, pin.version, tuple(sorted(hashes)))
        lines.append(" \\\n".join([f"{pin.name}=={pin.version}", *map(_option, written.hashes)]))
    LOCKS.mkdir(exist_ok=True)
    (LOCKS / path.name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _option(digest: str) -> str:
    return f"    --hash=sha256:{digest}"


if __name__ == "__main__":
    sys.exit(main())
