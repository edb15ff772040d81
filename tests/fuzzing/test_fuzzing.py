"""Every reader ends in the right result or in one clear refusal, whatever its files hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzzing.reader import Reader, make_case, overlay
from tests.fuzzing.readers import READERS
from tests.fuzzing.running import FINDINGS, Outcome, run_cases, summarize
from tests.fuzzing.table import RESULTS, store

FULL = os.environ.get("QUANTKIT_TRUST") == "full"
CASES = 10_000 if FULL else 300
FOUND = Path(__file__).with_name("found")

SamplesOf = Callable[[Reader], Path]


def describe(reader: Reader, outcomes: list[Outcome]) -> str:
    """The findings, and how each is run again."""
    return "\n".join(
        f"python -m tests.fuzzing {reader.name} {outcome.case}: {outcome.kind}: {outcome.words}"
        for outcome in outcomes
        if outcome.kind in FINDINGS
    )


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(
    name: str, samples_of: SamplesOf, tmp_path: Path
) -> None:
    """No crash, no hang, no memory beyond the bound, nothing written outside and nothing left."""
    reader = READERS[name]
    samples = samples_of(reader)

    def make(number: int, folder: Path) -> None:
        make_case(reader, number, samples, folder)

    outcomes = run_cases(reader, range(CASES), make, tmp_path / "cases")

    if FULL:
        store(RESULTS, name, summarize(outcomes))
    assert not describe(reader, outcomes)
    # Cases that are all refused, or all accepted, damage nothing that matters.
    assert {outcome.kind for outcome in outcomes} == {"accepted", "refused"}


@pytest.mark.parametrize("name", sorted(path.name for path in FOUND.glob("*/")))
def test_what_was_found_stays_mended(name: str, samples_of: SamplesOf, tmp_path: Path) -> None:
    """Each file that was once a finding, under the same watch."""
    reader = READERS[name]
    samples = samples_of(reader)
    found = sorted((FOUND / name).iterdir())

    def make(number: int, folder: Path) -> None:
        overlay(reader, found[number], samples, folder)

    outcomes = run_cases(reader, range(len(found)), make, tmp_path / "cases")

    faults = [o for o in outcomes if o.kind in FINDINGS]
    assert not [f"{found[o.case].name}: {o.kind}: {o.words}" for o in faults]
