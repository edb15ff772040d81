"""A job that is killed at any moment goes on from its blocks, and ends in the same bytes.

A few moments are tried by default; `make resume` tries many more, in every stage, and CI a part
of those.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.killing import KILLED, Done, Jobs, content, neighbours, open_jobs, spread

UNGATED = ("--no-gate",)
FISHER = ("--no-gate", "--set", "quantize.effort=best")
AUTO = ("--no-gate", "--set", "quantize.scheme=auto", "--set", "quantize.target_bits=8")
AUTO_ONLY = (*AUTO, "--set", "export=[{format: compressed-tensors}]")
MOMENTS = (
    [(UNGATED, 30), (FISHER, 8), (AUTO_ONLY, 8)]
    if os.environ.get("QUANTKIT_TRUST") == "full"
    else [(UNGATED, 10), (FISHER, 3), (AUTO_ONLY, 3)]
)
MOST_KILLS = 4


@dataclass(frozen=True)
class Undisturbed:
    """A job that ran through: what it made, and what that took."""

    files: Mapping[str, bytes]
    seconds: float
    calls: int


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A folder of jobs; the first one has loaded all that a job loads."""
    with open_jobs(tmp_path_factory.mktemp("jobs")) as made:
        assert made.quantize("first", *UNGATED, here=True).status == 0
        yield made


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> Undisturbed:
    """The job that is killed later, in one piece; another process made the same bytes."""
    found = run_undisturbed(jobs, UNGATED)
    assert found.files == content(jobs.folder / "first")
    return found


def run_undisturbed(jobs: Jobs, options: tuple[str, ...]) -> Undisturbed:
    done = jobs.quantize("whole", *options)
    assert done.status == 0, done.shown
    made = content(jobs.folder / "whole")
    jobs.quantize("whole", "--overwrite", *options)
    assert content(jobs.folder / "whole") == made
    discard(jobs.folder / "whole")
    return Undisturbed(made, done.seconds, done.calls)


def discard(folder: Path) -> None:
    """Remove a folder and all that is in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def finish(jobs: Jobs, output: str, whole: Undisturbed, options: tuple[str, ...]) -> None:
    """Run a killed job to its end, and see that nothing tells it from one that was not killed."""
    blocks = list(jobs.folder.glob(f"{output}.partial/workspace/block-*-*.safetensors"))
    # Killed after its last step, it has nothing left to do; this call removes what lies about.
    existed = (jobs.folder / output).exists()
    done = jobs.quantize(output, *options)
    if existed:
        assert done.status == 2
        assert f"output {output} exists" in done.shown
    else:
        assert done.status == 0, done.shown
        where = f"goes on with model.layers.{len(blocks)}" if len(blocks) < 4 else "all are solved"
        count = f"{len(blocks)} block{'s' if len(blocks) != 1 else ''}"
        assert not blocks or f"resumed after {count}, {where}" in done.shown
        assert len(re.findall(r"^quantize \d/4  model", done.shown, re.MULTILINE)) in (0, 4)
    assert neighbours(jobs.folder, output) == [output]
    assert content(jobs.folder / output) == whole.files
    discard(jobs.folder / output)


def test_killed_before_a_change_of_its_folder(jobs: Jobs, undisturbed: Undisturbed) -> None:
    """SIGKILL before a file is opened, synced, renamed or removed; the last one ends the job."""
    for call in spread(4, undisturbed.calls):
        done = jobs.quantize("out", *UNGATED, kill_before=call)
        assert done.status == KILLED
        finish(jobs, "out", undisturbed, UNGATED)


@pytest.mark.resume
def test_killed_again_while_it_goes_on(jobs: Jobs, undisturbed: Undisturbed) -> None:
    """By the clock, at any moment of each run."""
    kill_by_the_clock(jobs, undisturbed, UNGATED, random.Random(0))
    finish(jobs, "out", undisturbed, UNGATED)


def kill_by_the_clock(
    jobs: Jobs, whole: Undisturbed, options: tuple[str, ...], draw: random.Random
) -> list[Done]:
    """Kill a job up to four times on its way."""
    killed = []
    for _ in range(draw.randint(1, MOST_KILLS)):
        if not (jobs.folder / "out").exists():
            done = jobs.quantize("out", *options, kill_after=draw.uniform(0, whole.seconds))
            assert done.status in (0, KILLED), done.shown
            killed.append(done)
    return killed


QUICK = (
    "--no-gate",
    "--set",
    "quantize.method=rtn",
    "--set",
    "export=[{format: gguf, type: Q8_0}]",
)


@pytest.mark.resume
def test_the_old_output_stands_until_the_new_one_does(jobs: Jobs) -> None:
    """Killed at the last steps of a job with --overwrite, and neither of the two is half there."""
    replaced = (*QUICK, "--overwrite", "--set", "export=[{format: gguf, type: Q4_0}]")
    jobs.quantize("out", *QUICK)
    old = content(jobs.folder / "out")
    last = jobs.quantize("out", *replaced).calls
    new = content(jobs.folder / "out")
    assert {name for name in old if name.endswith(".gguf")} == {"gguf/model-Q8_0.gguf"}

    standing = set()
    for call in range(last - 60, last + 1, 5):
        jobs.quantize("out", *QUICK, "--overwrite")
        assert jobs.quantize("out", *replaced, kill_before=call).status == KILLED
        found = content(jobs.folder / "out")
        rest = {name for name in found if name == "lock" or name.startswith("workspace/")}
        whole = {name: data for name, data in found.items() if name not in rest}
        assert whole in (old, new)
        standing.add(whole == old)
        assert jobs.quantize("out", *replaced).status == 0
        assert content(jobs.folder / "out") == new
        assert neighbours(jobs.folder, "out") == ["out"]
    assert standing == {True, False}
    discard(jobs.folder / "out")


@pytest.mark.resume
@pytest.mark.parametrize(("options", "moments"), MOMENTS, ids=["plain", "best", "auto"])
def test_killed_before_every_few_changes(
    jobs: Jobs, options: tuple[str, ...], moments: int
) -> None:
    """From the first to the last."""
    whole = run_undisturbed(jobs, options)
    for call in spread(moments, whole.calls):
        assert jobs.quantize("out", *options, kill_before=call).status == KILLED
        finish(jobs, "out", whole, options)


@pytest.mark.resume
@pytest.mark.parametrize(("options", "moments"), MOMENTS, ids=["plain", "best", "auto"])
def test_killed_at_random_moments(jobs: Jobs, options: tuple[str, ...], moments: int) -> None:
    """By the clock, in chains of up to four."""
    whole = run_undisturbed(jobs, options)
    draw, killed = random.Random(1), 0
    while killed < moments:
        ended = kill_by_the_clock(jobs, whole, options, draw)
        killed += sum(done.status == KILLED for done in ended)
        finish(jobs, "out", whole, options)


@pytest.mark.resume
def test_killed_while_the_gate_runs(jobs: Jobs) -> None:
    """The solved blocks are gone through, not solved again, and the verdict is the same."""
    done = jobs.quantize("judged")
    assert done.status == 0, done.shown
    whole = Undisturbed(content(jobs.folder / "judged"), done.seconds, done.calls)
    for artifact in (1, 2):
        done = jobs.quantize("out", kill_at=("\ngate 0/8  loading", artifact))
        assert done.status == KILLED
        assert "\ngate " in done.shown
        finish(jobs, "out", whole, ())
