"""The shim hears what it says it hears, and breaks the call that it was told to."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.cli.running import ROOT, environment
from tests.faults.shim import Call, Fault, build_shim, read_calls, written_bytes

pytestmark = pytest.mark.faults

SCRIPT = """
import ctypes, fcntl, json, mmap, os, shutil, sys, tempfile
from tests.faults.shim import arm

arm(json.loads(sys.argv[1]))
os.chdir(sys.argv[2])
os.mkdir("sub")
with open("sub/a", "wb") as file:
    file.write(b"0123456789")
with open("sub/a", "r+b") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    os.fsync(file.fileno())
    os.ftruncate(file.fileno(), 12)
    os.pwrite(file.fileno(), b"ab", 10)
    os.writev(file.fileno(), [b"xy", b"z"])
    mmap.mmap(file.fileno(), 12).close()
shutil.copyfile("sub/a", "sub/b")
os.link("sub/a", "sub/c")
os.symlink("a", "sub/d")
os.rename("sub/b", "e")
path = ctypes.create_string_buffer(b"e"), ctypes.create_string_buffer(b"f")
assert ctypes.CDLL(None).renameat2(-100, path[0], -100, path[1], 1) == 0
os.listdir("sub")
with tempfile.TemporaryFile(dir=os.getcwd(), buffering=0) as file:
    file.write(b"found by nobody")
with open("/dev/null", "wb") as file:
    file.write(b"not here")
os.unlink("f")
shutil.rmtree("sub")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim, compiled."""
    return build_shim(tmp_path_factory.mktemp("shim"))


def run_script(library: Path, folder: Path, **how: object) -> tuple[int, str, list[Call]]:
    """Run the script with one of its calls broken; return its end, its words and its calls."""
    root = folder / "root"
    root.mkdir()
    fault = Fault(str(root), str(folder / "calls"), **how)  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(fault.request()), str(root)],
        cwd=ROOT,
        env=environment(LD_PRELOAD=str(library)),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, read_calls(folder / "calls")


def test_every_kind_of_call_is_heard(library: Path, tmp_path: Path) -> None:
    """Of this folder alone, with the bytes that are written and both names of what is renamed; but
    not what is written to files that have no name."""
    status, shown, calls = run_script(library, tmp_path)
    assert status == 0, shown
    assert [call.number for call in calls] == list(range(1, len(calls) + 1))
    kinds = Counter(call.kind for call in calls)
    assert {kind: kinds[kind] for kind in kinds if kind not in ("read", "write", "remove")} == {
        "mkdir": 1,
        "create": 4,
        "lock": 1,
        "sync": 1,
        "truncate": 1,
        "map": 1,
        "link": 2,
        "rename": 2,
    }
    assert kinds["remove"] == 5
    assert kinds["read"] >= 3
    root = str(tmp_path / "root")
    assert all(call.path.startswith(root) for call in calls)
    assert written_bytes(calls)[f"{root}/sub/a"] >= 10 + 2 + 3
    assert written_bytes(calls)[f"{root}/f"] >= 12
    assert not [call for call in calls if "deleted" in call.path]


def test_a_call_fails_and_those_that_take_room_after_it(library: Path, tmp_path: Path) -> None:
    """The first write fails; cleaning up is not disturbed."""
    (tmp_path / "counted").mkdir()
    _, _, calls = run_script(library, tmp_path / "counted")
    first = next(call.number for call in calls if call.kind == "write")
    status, shown, broken = run_script(
        library, tmp_path, at=first, action="fail", error=errno.ENOSPC, after=("write",)
    )
    assert status == 1
    assert "No space left on device" in shown
    assert [call.kind for call in broken[:first]] == [call.kind for call in calls[:first]]
    assert (tmp_path / "root" / "sub" / "a").read_bytes() == b""


@pytest.mark.parametrize(("action", "left"), [("kill", b""), ("tear", b"01234")])
def test_a_process_dies_before_a_write_or_in_the_midst_of_it(
    library: Path, tmp_path: Path, action: str, left: bytes
) -> None:
    """By SIGKILL: nothing in it runs after that."""
    (tmp_path / "counted").mkdir()
    _, _, calls = run_script(library, tmp_path / "counted")
    first = next(call.number for call in calls if call.kind == "write")
    status, _, broken = run_script(library, tmp_path, at=first, action=action)
    assert status == -signal.SIGKILL
    assert len(broken) == first
    assert (tmp_path / "root" / "sub" / "a").read_bytes() == left
