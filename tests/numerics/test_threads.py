"""Loops shared by threads that wait for the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantkit.numerics.threads import share_out

PREFIX = "share"

FORKING = """
import os, sys, warnings
import torch
from quantkit.numerics.threads import share_out

torch.set_num_threads(3)
def note(start, stop): parts.append((start, stop))
parts = []
share_out(note, 10, 3)
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
parts = []
share_out(note, 10, 3)
assert sorted(parts) == [(0, 3), (3, 6), (6, 10)], parts
if child:
    _, status = os.waitpid(child, 0)
    assert status == 0, status
elif sys.argv[1] == "at once":
    os._exit(0)
"""


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def waiting() -> list[threading.Thread]:
    """The threads that `share_out` keeps."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(PREFIX)]


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (10, 1, [(0, 10)]),
        (10, 0, [(0, 10)]),
        (10, 2, [(0, 5), (5, 10)]),
        (10, 9, [(0, 2), (2, 5), (5, 7), (7, 10)]),
        (3, 9, [(0, 1), (1, 2), (2, 3)]),
        (1, 9, [(0, 1)]),
        (0, 9, [(0, 0)]),
    ],
)
def test_every_thing_is_in_one_part(count: int, most: int, expected: list[tuple[int, int]]) -> None:
    """As many as torch has threads, and are worth it."""
    parts: list[tuple[int, int]] = []

    share_out(lambda start, stop: parts.append((start, stop)), count, most)

    assert sorted(parts) == expected


@pytest.mark.parametrize(("count", "number"), [(100, 12), (7, 7)])
def test_there_may_be_several_parts_a_thread(count: int, number: int) -> None:
    """But none is empty."""
    parts: list[tuple[int, int]] = []

    share_out(lambda start, stop: parts.append((start, stop)), count, 3, 4)

    assert len(parts) == number
    assert all(start < stop for start, stop in parts)
    assert sorted(thing for part in parts for thing in range(*part)) == list(range(count))


def test_parts_run_at_the_same_time() -> None:
    """Each waits for all."""
    barrier = threading.Barrier(4, timeout=60)
    share_out(lambda start, stop: barrier.wait() and None, 4, 4)


def test_who_is_free_does_the_parts_of_a_thread_that_is_not() -> None:
    """Be it busy for a call from elsewhere."""
    torch.set_num_threads(2)
    busy, free = threading.Barrier(3, timeout=60), threading.Event()
    found: list[tuple[int, int]] = []

    def wait(start: int, stop: int) -> None:
        busy.wait()
        free.wait(60)

    elsewhere = threading.Thread(target=share_out, args=(wait, 2, 2))
    elsewhere.start()
    busy.wait()
    share_out(lambda start, stop: found.append((start, stop)), 8, 2)
    free.set()
    elsewhere.join()

    assert found == [(0, 4), (4, 8)]


def test_threads_are_kept_and_do_not_grow_in_number() -> None:
    """One fewer than torch has: the caller's does a part."""
    for _ in range(50):
        share_out(lambda start, stop: None, 8, 4)
        share_out(lambda start, stop: None, 8, 2)

    kept = waiting()
    assert 1 <= len(kept) <= 3
    assert all(thread.is_alive() for thread in kept)


def test_another_number_of_threads_replaces_them() -> None:
    """The former ones end by themselves."""
    for threads in (4, 3, 2, 3):
        torch.set_num_threads(threads)
        share_out(lambda start, stop: None, 8, 4)
    until = time.monotonic() + 60
    while len(waiting()) > 2 and time.monotonic() < until:
        time.sleep(0.01)

    assert len(waiting()) <= 2


@pytest.mark.parametrize("broken", ["the caller's", "another's"])
def test_an_error_in_a_part_is_raised_when_all_have_ended(broken: str) -> None:
    """Whoever does it; the threads are of use afterwards."""
    caller, ended = threading.current_thread(), list[int]()
    begun = threading.Barrier(4, timeout=60)

    def run(start: int, stop: int) -> None:
        begun.wait()
        if (threading.current_thread() is caller) == (broken == "the caller's"):
            raise ValueError("a part is broken")
        time.sleep(0.05)
        ended.append(start)

    with pytest.raises(ValueError, match="a part is broken"):
        share_out(run, 8, 4)
    assert len(ended) == (3 if broken == "the caller's" else 1)

    again: list[int] = []
    share_out(lambda start, stop: again.append(start), 8, 4)
    assert sorted(again) == [0, 2, 4, 6]


def test_a_part_that_shares_out_itself_runs_alone() -> None:
    """Within the pool's threads, which would wait for each other; the caller's may share again."""
    begun = threading.Barrier(4, timeout=60)
    names: list[str] = []

    def outer(start: int, stop: int) -> None:
        begun.wait()
        found: list[tuple[str, int, int]] = []

        def inner(first: int, last: int) -> None:
            found.append((threading.current_thread().name, first, last))

        share_out(inner, 8, 4)
        if len(found) == 1:
            names.append(found[0][0])
        assert sum(last - first for _, first, last in found) == 8

    for _ in range(20):
        share_out(outer, 8, 4)
    assert len(names) == 20 * 3
    assert all(name.startswith(PREFIX) for name in names)


def test_calls_from_several_threads_end() -> None:
    """They have the same few threads to do their parts."""
    found: list[int] = []

    def call(_: int) -> None:
        share_out(lambda start, stop: found.append(stop - start), 8, 4)

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(call, range(100), timeout=60))

    assert sum(found) == 800


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.parametrize("end", ["at once", "in order"])
def test_a_forked_process_waits_for_no_thread_of_its_parent(end: str) -> None:
    """It has threads of its own, and both come to an end."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING, end], capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr
