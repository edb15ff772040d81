"""Reading ahead: order, errors, what is in memory, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from quantkit.checkpoint.ahead import read_ahead


def readers() -> list[threading.Thread]:
    """Threads of readers that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == "reading ahead"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a thread."""
    yield
    assert not readers()


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_values_come_in_order(depth: int) -> None:
    """However many are read ahead."""
    assert list(read_ahead(range(20), lambda number: number * number, depth)) == [
        number * number for number in range(20)
    ]
    assert list(read_ahead([], str, depth)) == []


def test_the_next_value_is_read_while_one_is_worked_on() -> None:
    """And not the one behind it."""
    begun = [threading.Event() for _ in range(4)]

    def load(number: int) -> int:
        begun[number].set()
        return number

    reader = read_ahead(range(4), load)
    for number in range(3):
        assert next(reader) == number
        assert begun[number + 1].wait(10)
        time.sleep(0.02)
        assert not any(event.is_set() for event in begun[number + 2 :])
    reader.close()


def test_two_values_are_in_memory_at_the_most() -> None:
    """The one at work and the one read ahead, as long as the one before is dropped."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def load(number: int) -> torch.Tensor:
        nonlocal most
        value = torch.full((10,), number)
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    reader = read_ahead(range(30), load)
    for number in range(30):
        value = next(reader)
        assert int(value[0]) == number
        del value

    assert most <= 2
    reader.close()
    assert not any(ref() is not None for ref in alive)


def test_an_error_is_raised_where_its_value_is_asked_for() -> None:
    """The values before it come first, and nothing is loaded behind it."""
    asked = []

    def load(number: int) -> int:
        asked.append(number)
        if number == 2:
            raise ValueError("number 2 is damaged")
        return number

    reader = read_ahead(range(5), load, 2)
    assert next(reader) == 0
    assert next(reader) == 1
    with pytest.raises(ValueError, match="number 2"):
        next(reader)
    assert asked == [0, 1, 2]


def test_a_closed_reader_leaves_no_value() -> None:
    """Neither the one that waits to be taken nor the one that is being read."""
    held: list[weakref.ref[torch.Tensor]] = []

    def load(_: int) -> torch.Tensor:
        time.sleep(0.05)
        value = torch.zeros(10)
        held.append(weakref.ref(value))
        return value

    reader = read_ahead(range(9), load, 3)
    next(reader)
    reader.close()

    assert not readers()
    assert len(held) < 9
    assert not any(ref() is not None for ref in held)


_WAITING = """
import time
from contextlib import closing
from quantkit.checkpoint.ahead import read_ahead

def load(number):
    print("loading", flush=True)
    time.sleep(30)

with closing(read_ahead(range(3), load)) as reader:
    next(reader)
"""


def test_an_interrupt_ends_a_job_that_waits_for_a_slow_disk() -> None:
    """Within two seconds, though the read itself takes longer."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.3)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)

    assert time.monotonic() - begun < 4
    assert "KeyboardInterrupt" in error
