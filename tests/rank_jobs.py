"""What the processes of a test's job run: `python -m tests.rank_jobs JOBS.json`.

The file has the jobs in a row, each a recipe. An outcome is written beside it for every rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any

from torch import Tensor

import quantkit
from quantkit import block_loop
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli.main import main
from quantkit.recipe import Recipe
from quantkit.records import BlockPlan


@dataclass(frozen=True)
class Outcome:
    """How the jobs ended on a rank: `done`, `left` with an exit code, or the text of the error."""

    endings: list[str]
    exit_code: int


def run_jobs(folder: Path, recipes: Sequence[Recipe], ranks: int = 2) -> list[Outcome]:
    """Run jobs one after the other in so many processes, as torchrun starts them.

    This process holds the store, as torchrun's agent does.
    """
    from torch.distributed import TCPStore

    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps([recipe.model_dump(mode="json") for recipe in recipes]))
    store = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60))
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "tests.rank_jobs", str(jobs)]
    processes = [
        Popen(words, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    exit_codes = [process.wait(timeout=240) for process in processes]
    return [
        Outcome(json.loads(_outcome_of(jobs, rank).read_text()), exit_code)
        for rank, exit_code in enumerate(exit_codes)
    ]


def _outcome_of(jobs: Path, rank: int) -> Path:
    return jobs.with_name(f"outcome-{rank}.json")


def _run(recipe: Recipe) -> str:
    try:
        quantkit.quantize(recipe, gate=False, device="cpu")
    except SystemExit as ended:
        return f"left {ended.code}"
    except quantkit.QuantkitError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _die_after_first_block(output: Path) -> None:
    """Let this process be killed as soon as a block is stored that is not the last one."""
    read_block = block_loop._read_block

    def read_or_die(checkpoint: Checkpoint, block: BlockPlan) -> Mapping[str, Tensor]:
        # Blocks are read ahead, in a thread of their own: the walk goes on meanwhile.
        while block.index == 2:
            if any(output.with_name(f"{output.name}.partial").glob("workspace/block-*-*")):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        return read_block(checkpoint, block)

    block_loop._read_block = read_or_die


def _start(arguments: list[str]) -> int:
    rank = int(os.environ["RANK"])
    if arguments[0] == "quantize":
        # The command itself, of which the second process is killed.
        if rank == 1:
            _die_after_first_block(Path(arguments[arguments.index("--output") + 1]))
        return main(arguments)
    jobs = Path(arguments[0])
    recipes: list[dict[str, Any]] = json.loads(jobs.read_text())
    endings = [_run(Recipe.model_validate(recipe)) for recipe in recipes]
    _outcome_of(jobs, rank).write_text(json.dumps(endings))
    return 0


if __name__ == "__main__":
    sys.exit(_start(sys.argv[1:]))
