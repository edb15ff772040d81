"""Many small jobs in one process, and what the process holds after each of them.

    python -m tests.soak.jobs FOLDER COUNT

makes a model in FOLDER and prints a line of JSON for each job: its kind, how it ended, and figures.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import quantkit
from quantkit.errors import QuantkitError
from quantkit.recipe import Recipe
from quantkit.records import Event
from tests.helpers import make_pico_model, pico_text


class Cancelled(Exception):
    """What a caller raises in its progress to get out of a job."""


def make_recipe(folder: Path, number: int, method: str, **other: object) -> Recipe:
    """A recipe on the model in `folder`."""
    data = {"data": str(folder / "calibration.txt"), "samples": 8, "sequence_length": 32}
    quantize = {"scheme": "w4a16", "group_size": 32, "method": method}
    recipe = {
        "version": 1,
        "model": str(folder / "model"),
        "output": str(folder / f"out-{number % 2}"),
        "calibration": data,
        "quantize": quantize,
    }
    return Recipe.model_validate(recipe | other)


def make_gate(folder: Path, most: float) -> dict[str, object]:
    """A gate that an artifact passes if its divergence may be as large as `most`."""
    return {
        "data": str(folder / "evaluation.txt"),
        "samples": 8,
        "sequence_length": 32,
        "probes": None,
        "max_perplexity_increase": "900%",
        "max_kl": most,
        "min_top1_agreement": 0,
    }


def solve(folder: Path, number: int) -> str:
    done = quantkit.quantize(
        make_recipe(folder, number, "gptq"), gate=False, overwrite=True, device="cpu"
    )
    return done.verdict


def round_to_gguf(folder: Path, number: int) -> str:
    export = [{"format": "gguf", "type": "Q4_0"}]
    recipe = make_recipe(folder, number, "rtn", export=export)
    return quantkit.quantize(recipe, gate=False, overwrite=True, device="cpu").verdict


def round_to_onnx(folder: Path, number: int) -> str:
    export = [{"format": "onnx", "precision": "int4"}]
    recipe = make_recipe(folder, number, "rtn", export=export)
    return quantkit.quantize(recipe, gate=False, overwrite=True, device="cpu").verdict


def judge(folder: Path, number: int) -> str:
    recipe = make_recipe(folder, number, "gptq", gate=make_gate(folder, 9))
    return quantkit.quantize(recipe, overwrite=True, device="cpu").verdict


def judge_badly(folder: Path, number: int) -> str:
    recipe = make_recipe(folder, number, "rtn", gate=make_gate(folder, 1e-9))
    return quantkit.quantize(recipe, overwrite=True, device="cpu").verdict


def convert(folder: Path, number: int) -> str:
    place = folder / f"converted-{number % 2}"
    return quantkit.convert(folder / "model", to="gguf:Q8_0", output=place, overwrite=True).source


def misspell(folder: Path, number: int) -> str:
    recipe = make_recipe(folder, number, "rtn")
    path = folder / "misspelt.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json") | {"quantise": {}}))
    quantkit.quantize(path, overwrite=True)
    return "done"


def miss(folder: Path, number: int) -> str:
    recipe = make_recipe(folder, number, "rtn", model=str(folder / "nothing"))
    quantkit.quantize(recipe, gate=False, overwrite=True)
    return "done"


def forget(folder: Path, number: int) -> str:
    """Write where an output is."""
    quantkit.quantize(make_recipe(folder, number, "rtn", output=str(folder / "kept")), gate=False)
    return "done"


def cancel(folder: Path, number: int) -> str:
    """Get out while blocks are solved, and leave what is solved behind."""

    def stop(event: Event) -> None:
        if event.stage == "quantize" and event.done == 1:
            raise Cancelled

    recipe = make_recipe(folder, number, "gptq", output=str(folder / "cancelled"))
    quantkit.quantize(recipe, gate=False, progress=stop, device="cpu", overwrite=True)
    return "done"


KINDS: tuple[Callable[[Path, int], str], ...] = (
    solve,
    round_to_gguf,
    misspell,
    convert,
    cancel,
    judge,
    round_to_gguf,
    forget,
    solve,
    round_to_onnx,
    miss,
    judge_badly,
)
"""In rotation."""


def measure() -> dict[str, int]:
    """What a process can hold too much of."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {
        # Without the pages of files, and with what was swapped: both depend on the machine's load.
        "memory_kb": sum(int(lines[name].split()[0]) for name in ("RssAnon", "VmSwap")),
        "files": len(os.listdir("/proc/self/fd")) - 1,
        "threads": int(lines["Threads"]),
        "python_threads": threading.active_count(),
        "children": sum(
            len(Path(path, "children").read_text().split())
            for path in Path("/proc/self/task").iterdir()
        ),
        "temporary": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
        "objects": len(gc.get_objects()),
        "modules": len(sys.modules),
        "handlers": sum(
            len(logger.handlers) + len(logger.filters)
            for logger in (logging.getLogger(), *logging.Logger.manager.loggerDict.values())
            if isinstance(logger, logging.Logger)
        ),
        "warning_filters": len(warnings.filters),
        "signals": sum(callable(signal.getsignal(number)) for number in signal.valid_signals()),
        "environment": len(os.environ),
        "containers": sum(
            count_held(module)
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == "quantkit"
        ),
    }


def count_held(module: ModuleType) -> int:
    """Count what the containers of a module hold, and the results that its functions keep."""
    total = 0
    for value in vars(module).values():
        if isinstance(value, dict | list | set | bytearray) and value is not vars(module):
            total += len(value)
        info = getattr(value, "cache_info", None)
        if callable(info) and getattr(value, "__module__", None) == module.__name__:
            total += info().currsize
    return total


def run(folder: Path, count: int) -> None:
    """Do the jobs, and print a line for each."""
    torch.set_num_threads(1)
    make_pico_model(folder / "model", layers=2)
    (folder / "calibration.txt").write_text(pico_text(900, seed=1))
    (folder / "evaluation.txt").write_text(pico_text(900, seed=2))
    quantkit.quantize(
        make_recipe(folder, 0, "rtn", output=str(folder / "kept")), gate=False, device="cpu"
    )
    for number in range(count):
        kind, started = KINDS[number % len(KINDS)], time.process_time()
        try:
            end = kind(folder, number)
        except (QuantkitError, Cancelled) as error:
            end = type(error).__name__
        seconds = time.process_time() - started
        line: dict[str, Any] = {"kind": kind.__name__, "end": end, "seconds": seconds}
        print(json.dumps(line | measure()), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
