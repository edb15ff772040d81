"""What a gate asks of its two workers, without the gate: with a baseline that may be remembered."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.judging.baseline.remembering import start_with
from quantkit.judging.baseline.store import open_store
from quantkit.judging.worker import running_pair

WORKER = Path(__file__).with_name("logging_worker.py")
ROWS = ([[1, 2, 3], [4, 5, 6]], [[7, 8, 9]])


@dataclass(frozen=True)
class Bench:
    """A baseline, its worker's script, and the log of all workers."""

    folder: Path
    model: Path
    script: Path
    log: Path


@dataclass(frozen=True)
class Seen:
    """What the baseline answered in one run, and what had to be done for it."""

    answers: list[dict[str, Any]]
    logits: list[bytes]
    asked: list[str]
    """The requests that reached the baseline's process, `start` first."""
    notes: tuple[str, ...]


def make_bench(folder: Path, **model: object) -> Bench:
    """Write a model and two scripts; `model` replaces what model.json says."""
    for role in ("baseline", "candidate"):
        (folder / role).mkdir()
        shutil.copy(WORKER, folder / role / f"{role}.py")
    (folder / "model").mkdir()
    (folder / "model" / "model.json").write_text(json.dumps({"vocab": 4, "scale": 0.5} | model))
    script = folder / "baseline" / "baseline.py"
    return Bench(folder, folder / "model", script, folder / "log.txt")


def run_gate(
    bench: Bench,
    rows: Sequence[list[list[int]]] = ROWS,
    *,
    prompts: Sequence[list[int]] = ([5, 6, 7],),
    threads: int = 1,
    enabled: bool = True,
    expect: int | None = None,
) -> Seen:
    """Load, ask for the logits of each batch of `rows`, and for one continuation a prompt."""
    bench.log.write_text("")
    store = open_store(enabled)
    scripts = (bench.script, bench.folder / "candidate" / "candidate.py")
    commands = [[sys.executable, str(script)] for script in scripts]
    if store is not None and expect is not None:
        store.expect(expect)
    answers, logits = [], []
    with running_pair(
        commands[0], commands[1], 300.0, threads=threads, start_baseline=start_with(store, 300.0)
    ) as pair:
        load = {"op": "load", "path": str(bench.model), "device": "cpu", "threads": threads}
        pair.ask(load, load)
        answers.append(pair.answers()[0])
        for batch in rows:
            files = [bench.folder / f"{role}.f32" for role in ("baseline", "candidate")]
            pair.ask(*({"op": "logits", "ids": batch, "file": str(file)} for file in files))
            answers.append(pair.answers()[0])
            logits.append(files[0].read_bytes())
            for file in files:
                file.unlink()
        for prompt in prompts:
            request = {"op": "generate", "prompt_ids": prompt, "max_new_tokens": 2}
            pair.ask(request, request)
            answers.append(pair.answers()[0])
    words = [line.split() for line in bench.log.read_text().splitlines()]
    asked = [word for role, word in words if role == "baseline"]
    return Seen(answers, logits, asked, store.take_notes() if store else ())
