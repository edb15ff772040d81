"""A job beside a training: a process of its own, which knows nothing of the training's others."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import InputError, QuantkitError, ResourceError, writing
from quantkit.judging.baseline.folder import BYTES_VARIABLE
from quantkit.sweeping.records import Ended

_RANK_VARIABLES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "ROLE_NAME",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")
"""How the variables begin by which torchrun and accelerate tell a process of the others."""

_SECONDS_TO_STOP = 15.0


def job_environment(environment: Mapping[str, str], gpu: str | None) -> dict[str, str]:
    """Return `environment` for a job that is alone.

    It joins no other process, and its gate keeps none of the baseline's answers, since each
    checkpoint is judged once. torchrun has set OMP_NUM_THREADS to 1 where the user has not, so that
    its processes share the cores; while the job runs, the others wait, and it may have them all.

    Args:
        environment: of the training.
        gpu: what the job's CUDA_VISIBLE_DEVICES is; None: as in the training.
    """
    child = {
        name: value
        for name, value in environment.items()
        if name not in _RANK_VARIABLES and not name.startswith(_LAUNCHERS)
    }
    if "TORCHELASTIC_RUN_ID" in environment and child.get("OMP_NUM_THREADS") == "1":
        del child["OMP_NUM_THREADS"]
    child.setdefault(BYTES_VARIABLE, "0")
    if gpu is not None:
        child["CUDA_VISIBLE_DEVICES"] = gpu
    return child


def run_alone(
    module: str, words: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Ended:
    """Run `python -m MODULE WORDS` to its end; what ends this process's waiting ends it too.

    It is in the process group of the training: what is sent to all of that reaches it.

    Args:
        log: gets what it writes to stderr, behind what is there.

    Raises:
        ResourceError, OutputError: the log cannot be written.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as handle:
                handle.write(f"$ {shlex.join([module, *words])}\n".encode())
                handle.flush()
                process = subprocess.Popen(
                    # Without -P, modules would be taken from the working folder.
                    [sys.executable, "-P", "-m", module, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=handle,
                    env=dict(environment),
                )
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
        said.seek(0)
        text = said.read().decode(errors="replace")
    return Ended(code, text, time.monotonic() - started)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a job end by itself; one that does not is killed."""
    process.terminate()
    try:
        process.wait(_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_refusal(ended: Ended, log: Path) -> QuantkitError | None:
    """Return what a rehearsal has refused, or None where it has refused nothing."""
    if ended.exit_code == 0:
        return None
    try:
        # Behind whatever libraries have printed.
        found: Any = json.loads(ended.said.strip().splitlines()[-1])
        text = str(found["error"])
    except (ValueError, KeyError, TypeError, IndexError):
        return QuantkitError(
            f"the rehearsal of the job ended with exit code {ended.exit_code}: see {log}"
        )
    kinds = {InputError.exit_code: InputError, ResourceError.exit_code: ResourceError}
    return kinds.get(ended.exit_code, QuantkitError)(text)


def write_answer(document: Mapping[str, Any]) -> None:
    """Say something to the process that waits, on stdout."""
    sys.stdout.write(json.dumps(document) + "\n")
