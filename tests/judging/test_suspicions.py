"""Tests of quantkit.judging.suspicions."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from quantkit.judging.suspicions import (
    compare_bits_per_weight,
    compare_hashes,
    compare_unexpected,
    has_loop,
)

TEXT = [7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9] * 2 + list(range(100, 140))
LOOP = [5, 6, 7, 8] * 16


@pytest.mark.parametrize(("written", "suspicious"), [(4.5, 0), (4.58, 0), (4.6, 1), (4.4, 1)])
def test_bits_per_weight_may_differ_by_two_percent(written: float, suspicious: int) -> None:
    """More means that something was not done, or done to the wrong layers."""
    assert len(compare_bits_per_weight(written, 4.5)) == suspicious


def test_files_that_are_not_the_recorded_ones_are_named(tmp_path: Path) -> None:
    """Changed, missing, outside of the folder, or added: one sentence each."""
    for name in ("a.json", "b.safetensors", "c.txt"):
        (tmp_path / name).write_bytes(name.encode())
    recorded = {
        name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.json", "b.safetensors")
    }
    assert compare_hashes(tmp_path, recorded) == ()

    (tmp_path / "a.json").write_bytes(b"changed")
    (tmp_path / "d.safetensors").write_bytes(b"")
    found = compare_hashes(tmp_path, recorded | {"gone.json": "0", "../x": "0"})

    assert len(found) == 4
    assert "'../x' is refused" in found[0]
    assert "'a.json' is not the one that was written" in found[1]
    assert "'gone.json' cannot be read" in found[2]
    assert "'d.safetensors' was not written by the job" in found[3]


def test_only_tensors_that_the_baseline_does_not_ignore_too_are_suspicious() -> None:
    """Nonsense from a worker counts as an empty list."""
    assert compare_unexpected(["inv_freq"], ["inv_freq"]) == ()
    assert compare_unexpected(None, None) == ()
    assert "for instance [1]" in compare_unexpected([{}], [[1], {}])[0]
    assert "ignored 2 tensors" in compare_unexpected(["x"], ["x", "y", "z"])[0]


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        (LOOP, True),
        ([9] * 24, True),
        ([9] * 23, False),
        (TEXT + [3] * 24, True),
        ([*LOOP, 1], False),
        (TEXT, False),
        ([], False),
        (list(range(16)) * 3, True),
        (list(range(17)) * 4, False),
        ([1, 2, 3] * 7, False),
        ([1, 2, 3] * 8, True),
    ],
)
def test_a_loop_is_a_tail_that_repeats_over_and_over(ids: list[int], loops: bool) -> None:
    """At most 16 tokens, at least three turns and 24 tokens, up to the very end."""
    assert has_loop(ids) == loops
