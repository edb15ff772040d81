"""Judging worker for encoders in ONNX Runtime: a script, run with the path of this file.

It may run under another interpreter than quantkit's, so it imports the standard library, numpy and
onnxruntime only. Requests and answers are those of encoder_worker.py; `path` is the .onnx file.

Of an embedding graph the output `sentence_embedding` is taken, else `token_embeddings` or
`last_hidden_state` is pooled here; of a classifier `logits`. An input that the graph needs and does
not get is an error, and so is one that says something and that the graph does not take.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

# Run by its path, the script is part of no package, and PYTHONSAFEPATH hides its folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from encoder_protocol import Reply, Rows, answer_encodings  # type: ignore[import-not-found]
from worker_protocol import FAILURES, find_versions, serve  # type: ignore[import-not-found]

if TYPE_CHECKING:
    import numpy as np

POOLED = "sentence_embedding"
UNPOOLED = ("token_embeddings", "last_hidden_state")
LOGITS = "logits"

RANKS = {"embedding": 2, "sequence-classification": 2, "token-classification": 3}
"""Task -> axes of what is written."""

INTEGERS = {"tensor(int64)": "int64", "tensor(int32)": "int32"}
"""Type of an input in ONNX Runtime's words -> numpy's."""

HARMLESS = {"attention_mask": 1, "token_type_ids": 0}
"""Input -> the value that says nothing when it fills all of it."""

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy")
"""Whose versions the evidence names."""

OUT_OF_MEMORY = "Failed to allocate memory"
"""Words of ONNX Runtime's allocators."""

# ONNX Runtime opens a file for telemetry, and threads that send it, unless told before its import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

ERRORS = 3
"""Level of ONNX Runtime's log: its warnings on what it did not fuse concern nobody here."""

Batch = dict[str, "np.ndarray"]
"""Input of the graph -> integers [B, T]."""


def main() -> int:
    """Serve requests from standard input until it ends."""
    try:
        failures = (*FAILURES, *_runtime_errors())
    except ImportError:
        # The answer to `load` says it.
        failures = FAILURES
    return int(serve(answer_encodings(load, _arrays), failures, OUT_OF_MEMORY, PACKAGES))


def _runtime_errors() -> tuple[type[Exception], ...]:
    """The classes that ONNX Runtime raises; not all of them derive from RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (getattr(state, name) for name in dir(state))
    return tuple(each for each in found if isinstance(each, type) and issubclass(each, Exception))


def load(request: Reply) -> tuple[Any, Reply]:
    """Load the graph; return what computes a batch, and the answer.

    Raises:
        ValueError: it has none of the outputs that the task needs.
    """
    import numpy
    import onnxruntime

    path, task, pooling = request["path"], request["task"], request["pooling"]
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.log_severity_level = ERRORS
    providers = ["CPUExecutionProvider"]
    if request["device"] != "cpu" and "CUDAExecutionProvider" in (
        onnxruntime.get_available_providers()
    ):
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    output = choose_output([each.name for each in session.get_outputs()], task)
    types = {each.name: each.type for each in session.get_inputs()}

    def run(batch: Batch) -> np.ndarray:
        feeds = make_feeds(types, batch)
        (found,) = session.run([output], feeds)
        found = found.astype(numpy.float32, copy=False)
        if output in UNPOOLED:
            found = pool(found, batch["attention_mask"], pooling)
        if found.ndim != RANKS[task]:
            raise ValueError(f"the output {output} has the shape {list(found.shape)} for a {task}")
        return found

    on_gpu = session.get_providers()[0] == "CUDAExecutionProvider"
    return run, {
        "ok": True,
        "device": "cuda" if on_gpu else "cpu",
        "versions": find_versions(*PACKAGES),
    }


def choose_output(names: list[str], task: str) -> str:
    """Return the output that has what the task needs.

    Raises:
        ValueError: there is none.
    """
    wanted = (POOLED, *UNPOOLED) if task == "embedding" else (LOGITS,)
    for name in wanted:
        if name in names:
            return name
    raise ValueError(
        f"the graph has the outputs {', '.join(names)}, and a {task} needs {' or '.join(wanted)}"
    )


def make_feeds(types: dict[str, str], batch: Batch) -> dict[str, np.ndarray]:
    """Return what the graph takes, each input in its type.

    Raises:
        ValueError: the graph needs what is not there, or does not take what must not be left out.
    """
    missing = sorted(types.keys() - batch.keys())
    if missing:
        raise ValueError(
            f"the graph needs the inputs {', '.join(missing)}, which were not given "
            f"(given: {', '.join(sorted(batch))})"
        )
    for name in batch.keys() - types.keys():
        if not (name in HARMLESS and bool((batch[name] == HARMLESS[name]).all())):
            raise ValueError(
                f"the graph does not take {name}, which matters to this batch "
                f"(it takes {', '.join(types)})"
            )
    wrong = sorted(name for name, kind in types.items() if kind not in INTEGERS)
    if wrong:
        raise ValueError(f"the input {wrong[0]} is a {types[wrong[0]]}, not one of integers")
    return {name: batch[name].astype(INTEGERS[types[name]], copy=False) for name in types}


def pool(hidden: np.ndarray, mask: np.ndarray, pooling: Reply) -> np.ndarray:
    """Return one vector [B, H] a text from `hidden` [B, T, H], as sentence-transformers does.

    Args:
        hidden: vectors of the tokens.
        mask: [B, T], 0 for padding.
        pooling: `mode` (mean, cls: the first token's, max) and `normalize`.

    Raises:
        ValueError: the mode is unknown.
    """
    import numpy

    weights = mask[:, :, None].astype(hidden.dtype)
    if pooling["mode"] == "mean":
        pooled = (hidden * weights).sum(axis=1) / weights.sum(axis=1).clip(min=1e-9)
    elif pooling["mode"] == "cls":
        pooled = hidden[:, 0]
    elif pooling["mode"] == "max":
        pooled = numpy.where(weights == 0, -numpy.inf, hidden).max(axis=1).astype(hidden.dtype)
    else:
        raise ValueError(f"pooling {pooling['mode']!r} is unknown")
    if not pooling["normalize"]:
        return pooled
    return pooled / numpy.linalg.norm(pooled, axis=1, keepdims=True).clip(min=1e-12)


def _arrays(batch: Rows) -> Batch:
    import numpy

    return {name: numpy.array(rows, dtype=numpy.int64) for name, rows in batch.items()}


if __name__ == "__main__":
    sys.exit(main())
