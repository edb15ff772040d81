"""The command `python -m tests.fuzzing`; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.fuzzing.reader import Reader, make_case
from tests.fuzzing.readers import READERS
from tests.fuzzing.running import FINDINGS, Outcome, read_samples, run_cases, summarize
from tests.fuzzing.table import store


def main() -> int:
    """Run what is asked for; 1 where there was a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("reader", nargs="?", choices=[*READERS, "all"])
    parser.add_argument("case", nargs="?", type=int, help="number of the one case to run again")
    parser.add_argument("--cases", type=int, default=1000, help="how many to run, from 0")
    parser.add_argument("--keep", type=Path, help="folder in which the files of the case stay")
    parser.add_argument("--output", type=Path, help="JSON file that the numbers are put in")
    asked = parser.parse_args()
    if asked.reader is None:
        print("\n".join(READERS))
        return 0
    names = READERS if asked.reader == "all" else (asked.reader,)
    return max(_run(READERS[name], asked) for name in names)


def _run(reader: Reader, asked: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix=f"fuzzing-{reader.name}-") as name:
        place = Path(name).resolve()
        samples = place / "samples"
        samples.mkdir()
        reader.build(samples)
        read_samples(reader, samples, place / "sound")

        def make(number: int, folder: Path) -> None:
            make_case(reader, number, samples, folder)

        one = asked.case is not None
        if asked.keep:
            make(asked.case, asked.keep)
        numbers = [asked.case] if one else list(range(asked.cases))
        outcomes = run_cases(reader, numbers, make, place / "cases")
        return _tell(reader, outcomes, asked)


def _tell(reader: Reader, outcomes: list[Outcome], asked: argparse.Namespace) -> int:
    found = [outcome for outcome in outcomes if outcome.kind in FINDINGS]
    for outcome in found if asked.case is None else outcomes:
        print(f"{reader.name} {outcome.case}: {outcome.kind}: {outcome.words}\n")
    summary = summarize(outcomes)
    print(reader.name, json.dumps(summary), flush=True)
    if asked.output and asked.case is None:
        store(asked.output, reader.name, summary)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
