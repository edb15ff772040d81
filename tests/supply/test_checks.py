"""What `make supply` looks for, it finds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distributions
from pathlib import Path
from threading import Thread

import audit
import licences
import lock
import pytest
from pins import Pin, canonical, read_pins

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.supply


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("Apache-2.0  WITH LLVM-exception", True),
        ("Apache-2.0 WITH another-exception", False),
        ("MPL-2.0 AND (GPL-3.0-only OR MIT)", True),
        ("(MIT", False),
        ("MIT OR", False),
        ("", False),
    ],
)
def test_a_licence_is_allowed_if_all_that_it_asks_for_is(expression: str, answer: bool) -> None:
    """One side of an OR suffices; what cannot be read is not allowed."""
    assert licences.is_allowed(expression, licences.read_rules().allowed) == answer


def test_a_new_unknown_licence_ends_the_check(tmp_path: Path) -> None:
    """Named with what to do; one that is allowed does not, and a folder that is missing is said."""
    for name, field in (("strange", "License: GPL-3.0"), ("fine", "License-Expression: MIT")):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{field}\n"
        (folder / "METADATA").write_text(text)
    command = [sys.executable, "scripts/supply/licences.py", str(tmp_path), str(tmp_path / "no")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert said[0] == f"licences: NOT CHECKED: {tmp_path / 'no'} is not set up"
    assert said[1].startswith("licences: strange 1.0: GPL-3.0: review it, and add it to")
    assert len(said) == 2


def test_a_pin_without_its_lock_is_found(tmp_path: Path) -> None:
    """A version that was changed, a hash that was lost, a package that is new."""
    for name in ("scripts/supply", "locks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("constraints*.txt"):
        shutil.copy2(path, tmp_path)
    file = tmp_path / "constraints-cuda.txt"
    file.write_text(file.read_text().replace("triton==3.7.1", "triton==3.7.2\nnew==1"))
    (tmp_path / "locks" / "constraints-supply.txt").write_text("tomli==2.5.0\n")
    command = [sys.executable, "scripts/supply/lock.py", "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for words in ("new 1 is in one", "triton 3.7.1 is in one", "triton 3.7.2 is", "tomli has no"):
        assert words in done.stderr


@pytest.mark.parametrize(
    ("file", "answer"),
    [
        ("a-1.0-py3-none-any.whl", True),
        ("a-1.0.tar.gz", True),
        ("a-1.1-py3-none-any.whl", False),
        ("a-1.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", True),
        ("a-1.0-cp313-cp313-macosx_14_0_arm64.whl", True),
        ("a-1.0-cp38-abi3-musllinux_1_2_aarch64.whl", True),
        ("a-1.0-cp313-cp313t-manylinux_2_28_x86_64.whl", False),
        ("a-1.0-cp310-cp310-manylinux_2_28_x86_64.whl", False),
        ("a-1.0-cp311-cp311-win_amd64.whl", False),
        ("a-1.0-cp314-abi3-manylinux_2_28_x86_64.whl", False),
        ("a-1.0.exe", False),
    ],
)
def test_a_lock_has_what_can_be_installed(file: str, answer: bool) -> None:
    """By the Pythons and systems that quantkit runs on."""
    assert lock.is_for_us(file, "1.0") == answer


def test_every_installed_file_could_be_verified() -> None:
    """What .venv has was locked: nothing came in that no hash stands for, but quantkit itself."""
    locked = {pin.key for pin in read_pins(ROOT / "locks" / "constraints.txt")}
    (site,) = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    names = {canonical(package.metadata["Name"]) for package in distributions(path=[site])}
    assert sorted(names - locked - {"quantkit"}) == []


HOLE = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fixed_in": ["1.1"], "withdrawn": None}
PAGES = {
    "/holed/json": {"info": {"version": "1.0"}, "vulnerabilities": [HOLE]},
    "/whole/json": {
        "info": {"version": "1.0"},
        "vulnerabilities": [HOLE | {"withdrawn": "2026-01-01"}],
    },
    "/older/json": {"info": {"version": "2.0"}, "vulnerabilities": [HOLE]},
}


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mirror that has the pages of packages, and none of their versions."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = PAGES.get(self.path)
            self.send_response(200 if page else 404)
            self.end_headers()
            self.wfile.write(json.dumps(page).encode() if page else b"")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(audit, "PYPI", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.usefixtures("mirror")
def test_what_nobody_answers_for_is_not_called_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page tells of its newest version: that of an older one stays unknown, and is said."""
    pins = tmp_path / "lock.txt"
    pins.write_text("".join(f"{name}==1.0\n" for name in ("gone", "holed", "older", "whole")))
    assert audit.main("no-such-program", [pins]) == 1
    said = capsys.readouterr()
    assert "audit: holed 1.0: CVE-1, PYSEC-1: fixed in 1.1" in said.err
    assert "audit: NOT CHECKED: no answer about gone 1.0, older 1.0" in said.err
    assert said.out == "audit: 2 of 4 versions checked, 1 to mend\n"


def test_what_pip_audit_skips_is_asked_elsewhere(tmp_path: Path) -> None:
    """It counts a package that its service does not know as one without findings."""
    pins = [Pin(name, "1.0", ()) for name in ("holed", "skipped", "whole")]
    answer = {
        "dependencies": [
            {"name": "holed", "vulns": [{"id": "A-1", "aliases": ["B-1"], "fix_versions": []}]},
            {"name": "skipped", "skip_reason": "not found on PyPI"},
            {"name": "whole", "vulns": []},
        ]
    }
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat '{tmp_path}/answer.json'; exit 1\n")
    program.chmod(0o755)
    findings, left = audit.run_pip_audit(str(program), pins)
    assert findings == [audit.Finding(pins[0], ("A-1", "B-1"), ())]
    assert left == [pins[1]]


def test_a_known_hole_has_its_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any of its names, and no longer."""
    known = tmp_path / "known.toml"
    entry = '[[known]]\npackage = "holed"\nid = "CVE-1"\nreason = "unused"\nuntil = 2026-12-31\n'
    known.write_text(entry)
    monkeypatch.setattr(audit, "KNOWN", known)
    found = [audit.Finding(Pin("holed", "1.0", ()), ("PYSEC-1", "CVE-1"), ())]
    assert audit.judge(found, today=date(2026, 12, 31)) == []
    (fault,) = audit.judge(found, today=date(2027, 1, 1))
    assert fault == "holed 1.0: CVE-1, PYSEC-1: no release mends it; no longer accepted"
