"""Every call by which a command changes a folder is broken once, in every way, and it goes on.

`make faults` breaks all of them, or with QUANTKIT_FAULTS=N as many of each command, evenly by each
trouble; by default (QUANTKIT_TRUST=ci) a few are. Those that are broken, a seed has drawn.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults import scenarios
from tests.faults.jobs import Runner, open_runner
from tests.faults.results import store, summarize
from tests.faults.shim import build_shim
from tests.faults.sweep import (
    TROUBLES,
    Beyond,
    Scenario,
    Trouble,
    Whole,
    break_at,
    list_points,
    reset,
    run_whole,
)
from tests.hub import HubServer
from tests.publishing.outputs import make_output

pytestmark = pytest.mark.faults

FULL = os.environ.get("QUANTKIT_TRUST", "ci") == "full"
MOST = int(os.environ.get("QUANTKIT_FAULTS", 1 << 30))
PACKED = "{format: compressed-tensors}"
GGUF = "{format: gguf, type: Q4_0}"
REPO = "alice/faults"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A Hub on this machine."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def runner(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """The process that runs the commands."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "home").mkdir()
    changes = hub.environment(folder / "home")
    with open_runner(build_shim(folder), folder, changes) as opened:
        yield opened


@pytest.fixture(scope="module")
def artifact(runner: Runner) -> Path:
    """The output of a demo job."""
    return make_artifact(runner, PACKED)


def make_artifact(runner: Runner, export: str) -> Path:
    """Run a demo job, and keep its output out of the way."""
    scenario = scenarios.quantize(export)
    place = runner.aside / export.strip("{}").replace(" ", "")
    if not place.exists():
        reset(runner, scenario)
        assert (ran := runner.run(scenario.words)).status == 0, ran.shown
        shutil.move(runner.root / "out", place)
    return place


def twins(artifact: Path) -> tuple[Path, Path]:
    """An artifact and a copy of it: of the same name twice there is nothing to compare."""
    copied = artifact.with_name(f"{artifact.name} again")
    if not copied.exists():
        shutil.copytree(artifact, copied)
    return artifact, copied


def sweep(
    runner: Runner,
    scenario: Scenario,
    few: int,
    most: int = MOST,
    whole: Whole | None = None,
    troubles: Sequence[Trouble] = TROUBLES,
) -> Whole:
    """Break a command at its calls, and see that nothing has gone wrong.

    Args:
        few: calls that are broken by default; at least one by each trouble.
        most: the same in a full sweep, at most.
        whole: the command undisturbed, where it has been run already.
    """
    whole = whole or run_whole(runner, scenario)
    points = [(each, at) for each in troubles for at in list_points(whole, each)]
    chosen = draw(points, min(most, MOST) if FULL else few)
    outcomes, known = [], dict[str, tuple[str, ...]]()
    for number, (trouble, at) in enumerate(chosen, start=1):
        outcome = break_at(runner, scenario, whole, trouble, at, known)
        outcomes.append(outcome)
        if outcome.problems or number % 50 == 0 or number == len(chosen):
            print(f"{scenario.name} {number}/{len(chosen)}", outcome if outcome.problems else "")
    counts = {each.name: len(list_points(whole, each)) for each in troubles}
    if FULL:
        store(scenario.name, summarize(whole, counts, outcomes))
    print(f"{scenario.name}: {len(whole.calls)} calls {whole.count_kinds()}, points {counts}")
    assert [outcome for outcome in outcomes if outcome.problems] == []
    return whole


def draw(points: list[tuple[Trouble, int]], count: int) -> list[tuple[Trouble, int]]:
    """Draw points, as many of each trouble; all where there are no more."""
    if count >= len(points):
        return points
    draw = random.Random(11)
    troubles = list(dict.fromkeys(trouble for trouble, _ in points))
    chosen = []
    for place in range(count):
        own = [each for each in points if each[0] == troubles[place % len(troubles)]]
        left = [each for each in own if each not in chosen]
        chosen += [draw.choice(left)] if left else []
    return chosen


DEMO = scenarios.quantize(PACKED, GGUF)


@pytest.fixture(scope="module")
def undisturbed(runner: Runner) -> Whole:
    """The demo job."""
    return run_whole(runner, DEMO)


@pytest.mark.parametrize("trouble", TROUBLES, ids=[trouble.name for trouble in TROUBLES])
def test_the_demo_job(runner: Runner, undisturbed: Whole, trouble: Trouble) -> None:
    """With two formats; the harness hears all that makes its files."""
    most = -(-MOST // len(TROUBLES))
    whole = sweep(runner, DEMO, 1, most, whole=undisturbed, troubles=[trouble])
    assert whole.unheard == ()


def test_a_conversion(runner: Runner) -> None:
    """To GGUF: its files are written by Python, a tensor at a time."""
    assert sweep(runner, scenarios.convert("gguf:Q4_0"), 3).unheard == ()


full = pytest.mark.skipif(not FULL, reason="by `make faults`")


@full
def test_an_output_that_is_replaced(runner: Runner) -> None:
    """The old one stands, or the new one does."""
    old = make_artifact(runner, GGUF)
    sweep(runner, scenarios.quantize(PACKED, overwrite=old), 0)


@full
def test_statistics(runner: Runner) -> None:
    """The walk of `calibrate`."""
    assert sweep(runner, scenarios.calibrate(), 0).unheard == ()


@full
@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda artifact: scenarios.gate(artifact / "compressed-tensors"), 200),
        (lambda artifact: scenarios.compare(*twins(artifact / "compressed-tensors")), 100),
        (lambda _: scenarios.quantize_judged(), 100),
        (lambda _: scenarios.quantize("{format: onnx}", name="quantize to ONNX"), 100),
    ],
    ids=["gate", "compare", "judged", "onnx"],
)
def test_commands_that_take_seconds(
    make: Callable[[Path], Scenario], most: int, runner: Runner, artifact: Path
) -> None:
    """A sample of their calls: models are loaded by processes of their own each time."""
    sweep(runner, make(artifact), 0, most)


@full
def test_a_publication(
    runner: Runner, hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Before its commit nothing is visible in the repository."""
    beyond = Beyond(hub.repos.clear, lambda: hub.files(REPO))
    passed = make_output(tmp_path_factory.mktemp("passed"))
    sweep(runner, scenarios.publish(passed, beyond, REPO), 0)
