"""Runs the command again and again in processes that have torch loaded, and kills them on request.

A process of its own, which loads everything once by doing a whole job, and forks. It reads a line
of JSON for each command from stdin, and answers with one on stdout:

    {"arguments": [...], "folder": ..., "log": ..., "kill_before": call, "kill_after": seconds,
     "kill_at": [words, times], "fill_before": call, "ballast": path}
    {"status": exit code or -9, "seconds": ..., "calls": ...}

The child is killed by SIGKILL: before its nth call that changes a folder (files that are opened for
writing, made, renamed, removed, synced), so many seconds after its start, or as soon as its log
has some words so many times. Or a file takes all that the disk has left before such a call. Or the
shim of tests/faults, which the process has in LD_PRELOAD then, breaks a call.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from quantkit.cli.main import main
from tests.changes import act_before_changes, die
from tests.faults.shim import arm

_TICK = 0.001
_LEFT = 8192


def fill(ballast: str) -> None:
    """Take the rest of a file system, but for what is too little for a block."""
    free = shutil.disk_usage(os.path.dirname(ballast)).free
    with open(ballast, "wb") as handle:
        handle.write(bytes(max(0, free - _LEFT)))


def live(request: dict[str, Any], answer: int) -> None:
    """What a child does: run the command, say how many changes it made, end."""
    os.setsid()
    os.chdir(request["folder"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    acts = {}
    if "kill_before" in request:
        acts[request["kill_before"]] = die
    if "fill_before" in request:
        acts[request["fill_before"]] = lambda: fill(request["ballast"])
    count = act_before_changes(acts)
    if "fault" in request:
        arm(request["fault"])
    status = main(request["arguments"])
    sys.stdout.flush()
    os.write(answer, str(count()).encode())
    os._exit(status)


def is_due(request: dict[str, Any], seconds: float) -> bool:
    """Whether a child is to be killed now, by the clock or by what it has said."""
    if "kill_at" in request:
        words, times = request["kill_at"]
        return Path(request["log"]).read_text(encoding="utf-8").count(words) >= times
    return "kill_after" in request and seconds > request["kill_after"]


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Run a command in a child, and kill it where that is asked for."""
    reading, writing = os.pipe()
    # What the last child said is not taken for what this one says.
    Path(request["log"]).write_text("", encoding="utf-8")
    begun = time.monotonic()
    child = os.fork()
    if not child:
        try:
            live(request, writing)
        finally:
            os._exit(99)
    os.close(writing)
    ended, status = 0, 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            if is_due(request, time.monotonic() - begun):
                os.kill(child, signal.SIGKILL)
            time.sleep(_TICK)
    seconds = time.monotonic() - begun
    # Workers end by themselves when nobody asks them any more; here nobody waits for that.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    calls = os.read(reading, 100).decode()
    os.close(reading)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "calls": int(calls or 0),
    }


def run() -> None:
    """Load everything, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("here"):
            os.chdir(request["folder"])
            begun = time.monotonic()
            status = main(request["arguments"])
            reply = {"status": status, "seconds": time.monotonic() - begun, "calls": 0}
        else:
            reply = serve(request)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    run()
