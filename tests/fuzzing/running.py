"""Reads cases in processes of their own, so that one that kills its process is named and survived.

A process is forked for each batch. The kernel ends it where a case takes too much: an interval
timer counts the processor time, so that a busy machine fails nothing, an alarm the seconds of a
case that waits for ever, and a limit of the address space stands behind the memory that is
measured.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from tests.fuzzing.judging import (
    ACCEPTED,
    CRASH,
    HANG,
    MOST_BYTES,
    Outcome,
    judge,
    listen,
    prepare_place,
)
from tests.fuzzing.reader import Reader, list_samples

MOST_SECONDS = 5.0
"""Of processor time that a case may take."""
_WAIT_SECONDS = 300
"""After which a case that takes no processor time is called a hang."""
_BATCH = 500
_ADDRESSES = 3 * MOST_BYTES
"""Of the address space, on top of what there is: threads and arenas take more than they use."""

Make = Callable[[int, Path], None]
"""Writes the files of a case to a folder, which it makes."""


def run_cases(reader: Reader, numbers: Sequence[int], make: Make, place: Path) -> list[Outcome]:
    """Read the cases of the given numbers.

    Args:
        place: a folder for the cases, which is made where it is not there.
    """
    place.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    while len(outcomes) < len(numbers):
        left = numbers[len(outcomes) :][:_BATCH]
        outcomes += _run_batch(reader, left, make, place.resolve())
    return outcomes


def read_samples(reader: Reader, samples: Path, place: Path) -> None:
    """Read what is not damaged, in this process: it has to be accepted, and loads what cases need.

    Raises:
        Exception: of the reader that refuses it.
    """
    # The threads of a pool are not there in a forked process, which would wait for them.
    torch.set_num_threads(1)
    with _environment(reader.environment):
        for sample in list_samples(samples):
            prepare = place / sample.name
            (prepare / "work").mkdir(parents=True)
            os.symlink(sample, prepare / "input")
            reader.read(prepare / "input")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _run_batch(reader: Reader, numbers: Sequence[int], make: Make, place: Path) -> list[Outcome]:
    """Read cases in a child until it ends; there is an outcome of each that it came to."""
    with tempfile.NamedTemporaryFile("r+") as told, tempfile.NamedTemporaryFile("r+b") as said:
        # What there is now is of all children: a child's collector would copy it by looking at it.
        gc.collect()
        gc.freeze()
        child = os.fork()
        if not child:
            try:
                _live(reader, numbers, make, place, told.name, said.fileno())
            except BaseException:
                os.write(said.fileno(), traceback.format_exc().encode())
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        gc.unfreeze()
        outcomes = [Outcome(**json.loads(line)) for line in told.read().splitlines()]
        if os.waitstatus_to_exitcode(status) or len(outcomes) < len(numbers):
            words = Path(said.name).read_bytes().decode("utf-8", "replace")
            shown = words if len(words) < 4000 else f"{words[:2000]} ... {words[-2000:]}"
            outcomes.append(_explain(numbers[len(outcomes)], status, shown))
    return outcomes


def _explain(case: int, status: int, said: str) -> Outcome:
    """What came of the case in which a child ended."""
    code = os.waitstatus_to_exitcode(status)
    if -code == signal.SIGPROF:
        words = f"it took more than {MOST_SECONDS:g} seconds of processor time"
        return Outcome(case, HANG, MOST_SECONDS, 0, words)
    if -code == signal.SIGALRM:
        return Outcome(case, HANG, 0, 0, f"it did not end within {_WAIT_SECONDS} seconds")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Outcome(case, CRASH, 0, 0, f"the process ended with {name}: {said}")


def _live(
    reader: Reader, numbers: Sequence[int], make: Make, place: Path, told: str, said: int
) -> None:
    """What a child does: read its cases, tell what came of each, end."""
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.enable(said)
    sys.dont_write_bytecode = True
    os.environ.update(reader.environment)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _ADDRESSES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(told, "w", buffering=1) as answers:
        heard = listen(place / "case", reader.starts)
        for number in numbers:
            prepare_place(place / "case", lambda folder, number=number: make(number, folder))
            signal.alarm(_WAIT_SECONDS)
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            outcome = judge(reader, number, place / "case", heard)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            answers.write(json.dumps(asdict(outcome)) + "\n")
    os._exit(0)


def summarize(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """What came of all cases, in numbers and with those of the findings."""
    kinds = [outcome.kind for outcome in outcomes]
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.growth)
    return {
        "cases": len(outcomes),
        "accepted": kinds.count(ACCEPTED),
        "refused": kinds.count("refused"),
        "crashes": kinds.count(CRASH),
        "hangs": kinds.count(HANG),
        "over_memory": kinds.count("memory"),
        "slowest_seconds": round(slowest.seconds, 3),
        "slowest_case": slowest.case,
        "peak_growth_mb": round(largest.growth / 2**20, 1),
        "peak_growth_case": largest.case,
        "findings": [outcome.case for outcome in outcomes if outcome.kind in FINDINGS][:50],
    }


FINDINGS = (CRASH, HANG, "memory")
"""Outcomes that nothing may have."""
