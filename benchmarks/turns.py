"""Kernels that are measured within this process: in turns, as the command would run them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from measure import describe_commit, describe_machine, package_versions, write_results

from quantkit.cli.process import settle_process

PACKAGES = ("quantkit", "torch", "numba")

Way = TypeVar("Way")


def settle_as_the_command() -> None:
    """Set for this process what the command sets for its own.

    Some of it is read when torch is imported, so where it is new the script begins again.
    """
    settled = "THP_MEM_ALLOC_ENABLE" in os.environ
    settle_process()
    if not settled:
        os.execv(sys.executable, [sys.executable, *sys.argv])


def take_turns(ways: Mapping[Way, Callable[[], object]], rounds: int) -> dict[Way, list[float]]:
    """Return the seconds of each way in each round, after one that does not count."""
    seconds: dict[Way, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def write_speeds(name: str, about: Mapping[str, Any], speeds: Sequence[Any], table: str) -> None:
    """Write the results of benchmarks/NAME.py: its table, and the speeds with what was measured.

    Args:
        about: how it was measured. speeds: records.
    """
    document = {
        **about,
        "threads": torch.get_num_threads(),
        "speeds": [asdict(speed) for speed in speeds],
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "commit": describe_commit(),
        "command": f"python benchmarks/{name}.py",
    }
    write_results(name, document, table)
