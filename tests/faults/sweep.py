"""One command, broken at one call, then run again: what must hold, and what did not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.killing import KILLED
from tests.faults.jobs import Ran, Runner
from tests.faults.settling import settle, settle_output
from tests.faults.shim import KINDS, Call, Fault, written_bytes

_OF_TORCH = "torchinductor_"
"""Begins the name of a folder that torch makes in TMPDIR once for all processes of a user."""
_CHANGING = tuple(kind for kind in KINDS if kind != "read")
_TAKING = ("create", "write", "mkdir", "truncate", "map", "link")
"""Calls that take room on the disk."""


@dataclass(frozen=True)
class Trouble:
    """A way to break a call."""

    name: str
    kinds: tuple[str, ...]
    """Of calls that it can happen to."""
    action: str
    error: int = 0
    after: tuple[str, ...] = ()
    """Kinds that go on failing, as on a disk that stays full."""


TROUBLES = (
    # Before a file is opened to be read, the disk is as before the next change.
    Trouble("SIGKILL", _CHANGING, "kill"),
    Trouble("torn write", ("write",), "tear"),
    Trouble("ENOSPC", (*_TAKING, "sync", "rename"), "fail", errno.ENOSPC, _TAKING),
    Trouble("EIO", KINDS, "fail", errno.EIO),
    Trouble("EMFILE", ("read", "create"), "fail", errno.EMFILE),
)


@dataclass(frozen=True)
class Beyond:
    """What a command changes that is not in its folder."""

    reset: Callable[[], None]
    read: Callable[[], Mapping[str, bytes]]


@dataclass(frozen=True)
class Scenario:
    """A command and what lies there before it."""

    name: str
    words: tuple[str, ...]
    output: str | None = None
    """The folder that it makes."""
    given: tuple[tuple[Path, str], ...] = ()
    """Folders that are copied to the place of the command, and their names there."""
    piece: str = ""
    """What the names of the files begin with that a resumed job need not make again."""
    beyond: Beyond | None = None


@dataclass(frozen=True)
class Whole:
    """A command that ran undisturbed."""

    calls: Sequence[Call]
    found: Mapping[str, bytes]
    made: Mapping[str, bytes] | None
    old: Mapping[str, bytes] | None
    """The output that stood before."""
    beyond: Mapping[str, bytes]
    status: int
    unheard: tuple[str, ...]
    """Files of the output that have more bytes than the shim has heard of."""

    def count_kinds(self) -> dict[str, int]:
        """Calls of each kind."""
        return dict(Counter(call.kind for call in self.calls))


@dataclass(frozen=True)
class Outcome:
    """What came of a command that was broken at a call."""

    scenario: str
    trouble: str
    kind: str
    number: int
    status: int
    problems: tuple[str, ...]
    path: str
    last: str
    """Line that it printed."""
    known: bool
    """It left what another one had left, from which the command went on to its end."""


def run_whole(runner: Runner, scenario: Scenario) -> Whole:
    """Run the command undisturbed, and before that to load everything.

    Raises:
        AssertionError: the two do not make the same bytes.
    """
    reset(runner, scenario)
    assert (warm := runner.warm(scenario.words)).status in (0, 3, 4), warm.shown
    found = settle(runner.root)
    whole = _run_whole(runner, scenario)
    assert found == whole.found
    return whole


def _run_whole(runner: Runner, scenario: Scenario) -> Whole:
    reset(runner, scenario)
    old = _output(runner, scenario)
    ran = runner.run(scenario.words)
    assert ran.status in (0, 3, 4), ran.shown
    made = _output(runner, scenario)
    found, beyond = settle(runner.root), _beyond(scenario)
    unheard = _list_unheard(runner, scenario, ran)
    return Whole(ran.calls, found, made, old, beyond, ran.status, unheard)


def _list_unheard(runner: Runner, scenario: Scenario, ran: Ran) -> tuple[str, ...]:
    if scenario.output is None or scenario.beyond is not None:
        return ()
    heard = written_bytes(ran.calls)
    files = [path for path in (runner.root / scenario.output).rglob("*") if path.is_file()]
    return tuple(str(path) for path in files if heard.get(str(path), -1) < path.stat().st_size)


def reset(runner: Runner, scenario: Scenario) -> None:
    """Empty the place of the command, and put there what it is given."""
    shutil.rmtree(runner.root)
    (runner.root / "tmp").mkdir(parents=True)
    for source, name in scenario.given:
        shutil.copytree(source, runner.root / name, copy_function=os.link)
    if scenario.beyond is not None:
        scenario.beyond.reset()


def _output(runner: Runner, scenario: Scenario) -> Mapping[str, bytes] | None:
    return None if scenario.output is None else settle_output(runner.root / scenario.output)


def _beyond(scenario: Scenario) -> Mapping[str, bytes]:
    return {} if scenario.beyond is None else dict(scenario.beyond.read())


def list_points(whole: Whole, trouble: Trouble) -> list[int]:
    """Numbers of the calls that a trouble can happen to."""
    return [call.number for call in whole.calls if call.kind in trouble.kinds]


Known = MutableMapping[str, tuple[str, ...]]
"""Digest of what a broken command left -> what was wrong when it was run again."""


def break_at(
    runner: Runner, scenario: Scenario, whole: Whole, trouble: Trouble, number: int, known: Known
) -> Outcome:
    """Run the command broken at a call, look at what stands, run it again, and look again.

    Args:
        known: what was found before. From the same files, with the same bytes but for how long
            things took, a command does the same: it is not run again.
    """
    reset(runner, scenario)
    fault = Fault(
        str(runner.root),
        str(runner.aside / "calls.txt"),
        number,
        trouble.action,
        trouble.error,
        trouble.after,
    )
    broken = runner.run(scenario.words, fault)
    call = broken.calls[number - 1] if len(broken.calls) >= number else None
    problems = []
    # Folders are read in the order of the disk, so that neighbours change places now and then.
    if call is None:
        problems.append(f"only {len(broken.calls)} calls")
    problems += _look_at_end(broken, trouble, whole)
    problems += _look_at_rest(runner, scenario, whole, broken, number)
    left = _digest(runner, scenario)
    seen = left in known
    if not seen:
        known[left] = tuple(_run_again(runner, scenario, whole))
    problems += known[left]
    return Outcome(
        scenario.name,
        trouble.name,
        "" if call is None else call.kind,
        number,
        broken.status,
        tuple(problems),
        "" if call is None else call.path.removeprefix(str(runner.root)),
        broken.shown.strip().rpartition("\n")[2],
        seen,
    )


def _digest(runner: Runner, scenario: Scenario) -> str:
    """Of all that the next run finds; temporary files it does not."""
    digest = hashlib.sha256()
    beyond = {f"beyond/{name}": data for name, data in _beyond(scenario).items()}
    for name, data in {**settle(runner.root), **beyond}.items():
        if not name.startswith("tmp/"):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _look_at_end(broken: Ran, trouble: Trouble, whole: Whole) -> list[str]:
    """A killed process is killed; an error is one line with exit code 5, or does no harm."""
    if trouble.action != "fail":
        return [] if broken.status == KILLED else [f"not killed: {broken.status}"]
    lines = broken.shown.strip().splitlines()
    said = [line for line in lines if line.startswith("error")]
    problems = []
    if broken.status not in (whole.status, 5):
        problems.append(f"exit code {broken.status}")
    if "Traceback" in broken.shown:
        problems.append("a traceback")
    if broken.status == 5 and (len(said) != 1 or lines[-1] != said[0]):
        problems.append(f"{len(said)} lines of errors, or not at the end")
    return problems


def _look_at_rest(
    runner: Runner, scenario: Scenario, whole: Whole, broken: Ran, number: int
) -> list[str]:
    """What stands under final names is whole; finished pieces are there; no scratch is left."""
    problems = []
    standing = _output(runner, scenario)
    if standing is not None and standing not in (whole.old, whole.made):
        problems.append(f"half an output: {_differ(standing, whole.made)}")
    if _beyond(scenario) not in ({}, whole.beyond):
        problems.append("half a publication")
    finished = _count_made(broken.calls, scenario, before=number)
    if standing != whole.made and len(_pieces(runner, scenario)) < finished:
        problems.append(f"of {finished} finished pieces {len(_pieces(runner, scenario))} are left")
    scratch = [name for name in os.listdir(runner.root / "tmp") if not name.startswith(_OF_TORCH)]
    if broken.status != KILLED and scratch:
        problems.append(f"left in TMPDIR: {sorted(scratch)}")
    return problems


def _run_again(runner: Runner, scenario: Scenario, whole: Whole) -> list[str]:
    """Without a fault: it ends as the undisturbed run, and makes again what was not finished."""
    stood = _output(runner, scenario)
    pieces = len(_pieces(runner, scenario))
    shutil.rmtree(runner.root / "tmp")
    (runner.root / "tmp").mkdir()
    again = runner.run(scenario.words)
    problems = []
    exists = stood is not None and stood == whole.made != whole.old
    refused = again.status == 2 and f"output {scenario.output} exists" in again.shown
    if again.status != whole.status and not (exists and refused):
        problems.append(f"again: exit code {again.status}: {again.shown[-300:]}")
    made, all_made = (_count_made(calls, scenario) for calls in (again.calls, whole.calls))
    if not refused and made != all_made - pieces and stood != whole.made:
        problems.append(f"again: {made} pieces made of {all_made}, {pieces} were there")
    found = settle(runner.root)
    if found != whole.found:
        problems.append(f"again: {_differ(found, whole.found)}")
    if _beyond(scenario) != whole.beyond:
        problems.append("again: another publication")
    return problems


def _pieces(runner: Runner, scenario: Scenario) -> list[Path]:
    if not scenario.piece:
        return []
    folder = runner.root / f"{scenario.output}.partial" / "workspace"
    return sorted(folder.glob(f"{scenario.piece}-*-*.safetensors"))


def _count_made(calls: Sequence[Call], scenario: Scenario, before: int | None = None) -> int:
    """How many pieces got their names before a call, or at all."""
    return sum(
        call.kind == "rename"
        and f"/{scenario.piece}-" in call.other
        and call.other.endswith(".safetensors")
        and "/workspace/" in call.other
        and (before is None or call.number < before)
        for call in calls
        if scenario.piece
    )


def _differ(found: Mapping[str, bytes], wanted: Mapping[str, bytes] | None) -> str:
    wanted = wanted or {}
    more, less = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return json.dumps({"more": more[:5], "less": less[:5], "other": other[:5]})
