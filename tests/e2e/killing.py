"""Jobs that are killed and begun again, and how their outputs are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.running import ROOT, environment
from tests.helpers import make_pico_model, pico_text

KILLED = -9

RECIPE = """\
version: 1
model: model
calibration: {data: calibration.txt, samples: 16, sequence_length: 32}
quantize: {scheme: w4a16, group_size: 32, method: gptq}
export: [{format: compressed-tensors}, {format: gguf, type: Q4_0}]
gate:
  data: evaluation.txt
  samples: 8
  sequence_length: 32
  probes: {max_new_tokens: 8}
  max_perplexity_increase: 900%
  max_kl: 9
  min_top1_agreement: 0
"""


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    status: int
    seconds: float
    calls: int
    shown: str


@dataclass(frozen=True)
class Jobs:
    """A folder with a model and a recipe, and a process that runs commands there."""

    folder: Path
    process: subprocess.Popen[str]

    def quantize(self, output: str, *more: str, **how: Any) -> Done:
        """Run `quantkit quantize` to an output, to its end or as `how` says; see forking.py."""
        log = self.folder / "log.txt"
        request = {
            "arguments": ["quantize", "--recipe", "recipe.yaml", "--output", output, *more],
            "folder": str(self.folder),
            "log": str(log),
            **how,
        }
        reply = ask(self.process, self.folder / "forking.txt", request)
        return Done(**reply, shown=log.read_text() if log.exists() else "")


@contextmanager
def open_jobs(folder: Path) -> Iterator[Jobs]:
    """Make a model with its texts and a recipe, and start the process that forks."""
    make_pico_model(folder / "model", layers=4)
    (folder / "calibration.txt").write_text(pico_text(900, seed=1))
    (folder / "evaluation.txt").write_text(pico_text(1500, seed=2))
    (folder / "recipe.yaml").write_text(RECIPE)
    with forking(folder / "forking.txt") as process:
        yield Jobs(folder, process)


@contextmanager
def forking(said: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start the process that forks; what it says itself goes into a file."""
    with said.open("w") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.forking"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            env=environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", **variables),
        )
    try:
        yield process
    finally:
        process.communicate(timeout=60)


def ask(
    process: subprocess.Popen[str], said: Path, request: Mapping[str, object]
) -> dict[str, Any]:
    """Send a request to the process that forks, and return its answer; see forking.py."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    assert answer, said.read_text()
    reply: dict[str, Any] = json.loads(answer)
    return reply


def content(output: Path) -> dict[str, bytes]:
    """Every file of an output but its reports, which tell how long things took.

    Of the evidence all that does not depend on the time, and on the name of the output.
    """
    found = {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.parent != output / "report"
    }
    evidence = json.loads(found["quantkit.json"])
    for key in ("timings", "recipe"):
        del evidence[key]
    return found | {"quantkit.json": json.dumps(evidence).encode()}


def neighbours(folder: Path, output: str) -> list[str]:
    """The names of an output and of what lies beside it because of it."""
    return sorted(path.name for path in folder.glob(f"{output}*"))


def spread(count: int, among: int) -> Sequence[int]:
    """Numbers from 1 to `among`, evenly far from each other."""
    return sorted({1 + round(place * (among - 1) / max(1, count - 1)) for place in range(count)})
