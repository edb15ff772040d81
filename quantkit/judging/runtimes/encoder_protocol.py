"""What both workers for encoders do alike: load, encode batches, time them.

Part of each worker, which runs under another interpreter than quantkit's: only the standard library
is imported here. encoder_worker.py describes the requests and answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Reply = dict[str, Any]
Rows = dict[str, list[list[int]]]
"""Input of the model -> a list a text, all of one length."""


def answer_encodings(
    load: Callable[[Reply], tuple[Any, Reply]], convert: Callable[[Rows], Any]
) -> Callable[[Reply], Reply]:
    """Return what answers the requests of an encoder's gate.

    Args:
        load: takes the request; returns what computes a converted batch, float32 [B, ...] of numpy,
            and the answer.
        convert: makes of a batch what the runtime computes with.
    """
    run: Any = None

    def answer(request: Reply) -> Reply:
        nonlocal run
        if request["op"] == "load":
            run, reply = load(request)
            return reply
        if request["op"] == "encode":
            return _write(run(convert(request["batch"])), request["file"])
        if request["op"] == "time":
            return _measure(run, [convert(batch) for batch in request["batches"]])
        return {"ok": True}

    return answer


def _write(output: Any, file: str) -> Reply:
    """Write the float32 numbers of one batch to `file`."""
    with open(file, "wb") as handle:
        handle.write(output.tobytes())
    return {"ok": True, "shape": list(output.shape)}


def _measure(run: Any, batches: list[Any]) -> Reply:
    """Time one pass over all batches."""
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    return {"ok": True, "seconds": time.perf_counter() - started}
