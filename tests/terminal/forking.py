"""Starts commands on terminals, in processes that have everything loaded: a second faster each.

Reads a line of JSON for each from stdin, {"arguments": [...] or "code": ..., "folder", "terminal":
path, "environment": {...}}, and answers on stdout with its process number, and at its end with its
exit code. With the word `torch` it loads what jobs need too.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

from quantkit.cli import bars, main, stopping  # noqa: F401


def live(request: dict[str, Any], begun: int) -> None:
    """What a child does: take the terminal as its own, and run the command."""
    os.setsid()
    # The first that a leader of a session opens is its terminal, whose keys are signals for it.
    terminal = os.open(request["terminal"], os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    os.close(terminal)
    os.close(begun)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = open(number, "wb", closefd=False)  # noqa: SIM115
        setattr(sys, name, io.TextIOWrapper(raw, encoding, line_buffering=True))
    if "code" in request:
        exec(compile(request["code"], "<job>", "exec"), {"__name__": "__main__"})
    sys.exit(main.main(request["arguments"]))


def serve(request: dict[str, Any], answers: io.TextIOBase) -> None:
    """Run one command in a child, and tell of its beginning and its end."""
    waiting, begun = os.pipe()
    child = os.fork()
    if not child:
        code = 99
        try:
            os.close(waiting)
            live(request, begun)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(begun)
    os.read(waiting, 1)  # nothing: its other end is closed once the child has the terminal
    os.close(waiting)
    print(child, file=answers, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def run() -> None:
    """Load everything, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if "torch" in sys.argv:
        import torch
        import transformers  # noqa: F401

        import quantkit.pipeline  # noqa: F401

        torch.set_num_threads(1)
    for line in sys.stdin:
        serve(json.loads(line), answers)


if __name__ == "__main__":
    run()
