"""A disk that another file fills while a job works; with room again, the job ends in its bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import ROOT
from tests.e2e.killing import Jobs, content, open_jobs

pytestmark = pytest.mark.resume


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of its own, larger than the plan asks for."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED, no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def jobs(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A folder of jobs elsewhere; the first one is not disturbed."""
    with open_jobs(tmp_path_factory.mktemp("jobs")) as made:
        assert made.quantize(str(disk / "first"), "--no-gate", here=True).status == 0
        yield made


@pytest.fixture
def ballast(disk: Path) -> Iterator[Path]:
    """The file that takes all room; it is removed if the test does not get that far."""
    yield disk / "ballast"
    (disk / "ballast").unlink(missing_ok=True)


@pytest.mark.skipif(bool(os.geteuid()), reason="run again as root of a namespace, below")
@pytest.mark.parametrize(
    ("calls", "stage", "blocks"),
    [(range(16, 60, 3), "quantize", range(1, 4)), (range(60, 120, 10), "write", range(4, 5))],
    ids=["solving", "writing"],
)
def test_a_disk_that_fills_up_keeps_the_blocks(
    jobs: Jobs, disk: Path, ballast: Path, calls: range, stage: str, blocks: range
) -> None:
    """Exit code 5 and a line that says where; what is solved is not solved again."""
    output = str(disk / "out")
    for call in calls:
        full = jobs.quantize(output, "--no-gate", fill_before=call, ballast=str(ballast))
        stored = list((disk / "out.partial" / "workspace").glob("block-*-*.safetensors"))
        if len(stored) in blocks and full.shown.splitlines()[-2].startswith(f"{stage} "):
            break
        # A little earlier or later than was wanted.
        ballast.unlink()
        for folder in (disk / "out", disk / "out.partial"):
            shutil.rmtree(folder, ignore_errors=True)
    assert full.status == 5, full.shown
    *before, last = full.shown.strip().splitlines()
    assert last.startswith(f"error: no space left while writing {disk}/out.partial/")
    assert not [line for line in before if line.startswith("error") or "Traceback" in line]
    assert before[-1].startswith(f"{stage} ")
    assert len(stored) in blocks
    assert not list(disk.rglob("*.writing"))

    ballast.unlink()
    done = jobs.quantize(output, "--no-gate")
    assert done.status == 0, done.shown
    assert f"resumed after {len(stored)} block" in done.shown
    assert content(disk / "out") == content(disk / "first")
    assert sorted(path.name for path in disk.iterdir()) == ["first", "out"]
    shutil.rmtree(disk / "out")


@pytest.mark.skipif(not os.geteuid(), reason="root mounts a file system itself")
def test_a_full_disk_as_root_of_a_namespace() -> None:
    """For users who may not mount: the test above, where they may."""
    inside = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "resume",
        __file__,
    ]
    command = ["unshare", "--map-root-user", "--mount"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"NOT TESTED, no namespace can be had here: {tried.stderr.strip()}")
    done = subprocess.run([*command, *inside], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
