"""Judging worker for llama.cpp: a script, run as `python llamacpp_worker.py`.

It runs under the interpreter that has the wheel xllamacpp and imports the standard library and
numpy only. Requests and answers are those of transformers_worker.py, one line of JSON each, with
these differences:

    {"op": "load", "path", "device", "threads"}: `path` is a GGUF file, the first of its parts, or a
        folder that holds one model
        -> "dtype" is the name of the file's mix of types, "kv_cache" the type of the cache
    {"op": "time", "ids": [[...], ...], "new_tokens"}: one row of `ids` after the other
    {"op": "tokenize", "texts": [...]}
        -> {"ok": true, "plain": [[...], ...], "special": [[...], ...]}, what llama.cpp's own
            tokenizer makes of the texts, without and with what it adds to a prompt; both null where
            the file has no tokenizer

The logits of all positions are llama.cpp's own, as its users get them: its defaults are kept, which
are a key/value cache in float16 and flash attention where the machine has it. Of float32 weights
they make a mean KL of some 1e-6 (docs/runtimes.md). Tokens are given as ids, nothing is added to
them, and the cache is emptied before each window.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Run by its path, the script is part of no package, and PYTHONSAFEPATH hides its folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from llamacpp_library import (  # type: ignore[import-not-found]
    STEP,
    Library,
    Model,
    find_version,
)
from worker_protocol import FAILURES, find_versions, serve  # type: ignore[import-not-found]

PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
"""End of the name of a part of a split file."""

KV_CACHE = "float16"
"""The type of llama.cpp's cache by default."""

PACKAGES = ("xllamacpp",)
"""Whose version decides what is computed."""

OUT_OF_MEMORY = "failed to allocate"
"""Words of llama.cpp's log."""

Reply = dict[str, Any]


def main() -> int:
    """Serve requests from standard input until it ends."""
    model: Any = None

    def answer(request: Reply) -> Reply:
        nonlocal model
        if request["op"] == "load":
            path = Path(request["path"])
            model, reply = load(model, path, request["device"], request["threads"])
            return reply
        if request["op"] == "logits":
            return write_logits(model, request["ids"], request["file"], request.get("last", 0))
        if request["op"] == "generate":
            return generate(model, request["prompt_ids"], request["max_new_tokens"])
        if request["op"] == "continue":
            room = request["max_new_tokens"]
            answers = [generate(model, prompt, room) for prompt in request["prompts"]]
            return {"ok": True, "ids": [answer["ids"] for answer in answers]}
        if request["op"] == "tokenize":
            return tokenize(model, request["texts"])
        if request["op"] == "time":
            return measure(model, request["ids"], request["new_tokens"])
        return {"ok": True}

    return int(serve(answer, FAILURES, OUT_OF_MEMORY, PACKAGES))


def load(last: Any, path: Path, device: str, threads: int) -> tuple[Any, Reply]:
    """Load the GGUF file at `path` in place of the last one, and say what it became.

    Raises:
        ImportError: xllamacpp is not there.
        RuntimeError: it is of another build.
        ValueError: `path` holds no GGUF file, or llama.cpp refuses it.
    """
    library = Library() if last is None else last.library
    model = Model(library, find_file(path), device, threads)
    if not model.predicts:
        raise ValueError(f"{path.name} is a model without a decoder: it predicts no tokens")
    if last is not None:
        last.close()
    version = find_version()
    return model, {
        "ok": True,
        "vocab": model.vocabulary,
        "dtype": model.file_type,
        "device": model.device,
        "kv_cache": KV_CACHE,
        # llama.cpp itself refuses files with tensors that it has no place for.
        "unexpected": [],
        "positions": model.positions,
        "versions": {
            **find_versions(),
            "xllamacpp": version,
            "llama.cpp": f"b{version.rpartition('.')[2]}",
        },
    }


def find_file(path: Path) -> Path:
    """The file that llama.cpp opens: `path`, or the one model in the folder `path`.

    Raises:
        ValueError: there is none, or more than one; or `path` is a later part of a split file.
    """
    if path.is_dir():
        firsts = [file for file in sorted(path.glob("*.gguf")) if _part(file.name) == 1]
        if len(firsts) != 1:
            names = ", ".join(file.name for file in firsts[:4]) or "none"
            raise ValueError(f"{path} must hold one GGUF model, and holds {names}: name the file")
        path = firsts[0]
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if _part(path.name) != 1:
        raise ValueError(f"{path.name} is a later part of a split file: name its first part")
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ValueError(f"{path.name} is not a GGUF file")
    return path


def _part(name: str) -> int:
    """Number of the part of a split file that `name` says; a file that is whole is its first."""
    found = PART.search(name)
    return int(found[1]) if found else 1


def write_logits(model: Any, ids: list[list[int]], file: str, last: int) -> Reply:
    """Write the logits of the `last` positions of `ids` [B, T], or of all for 0, in parts."""
    finite = True
    with open(file, "wb") as handle:
        for row in ids:
            model.start(len(row))
            first = len(row) - (last or len(row))
            for position in range(0, len(row), STEP):
                part = row[position : position + STEP]
                is_wanted = position + len(part) > first
                logits = model.run(part, position, every=is_wanted)
                logits = logits[max(0, first - position) :] if is_wanted else logits[:0]
                finite = finite and bool(np.isfinite(logits).all())
                handle.write(logits.data)
    shape = [len(ids), last or len(ids[0]), model.vocabulary]
    return {"ok": True, "shape": shape, "finite": finite}


def generate(model: Any, prompt_ids: list[int], max_new_tokens: int) -> Reply:
    """Continue `prompt_ids` with the most probable tokens, within the model's positions."""
    room = min(max_new_tokens, model.positions - len(prompt_ids))
    found: list[int] = []
    if room < 1:
        return {"ok": True, "ids": found}
    model.start(len(prompt_ids) + room)
    for token in _continue_greedily(model, prompt_ids):
        found.append(token)
        if len(found) == room or model.ends(token):
            break
    return {"ok": True, "ids": found}


def _continue_greedily(model: Any, prompt_ids: list[int]) -> Iterator[int]:
    """Yield the most probable next tokens behind `prompt_ids`, step by step."""
    pending, position = prompt_ids, 0
    while True:
        for start in range(0, len(pending), STEP):
            part = pending[start : start + STEP]
            logits = model.run(part, position, every=False)
            position += len(part)
        pending = [int(logits[0].argmax())]
        yield pending[0]


def measure(model: Any, ids: list[list[int]], new_tokens: int) -> Reply:
    """Time `ids` [B, T], row by row, and `new_tokens` greedy steps behind each row."""
    prefill = decoding = 0.0
    for row in ids:
        model.start(len(row) + new_tokens)
        greedy = _continue_greedily(model, row)
        start = time.perf_counter()
        next(greedy)
        middle = time.perf_counter()
        for _ in range(new_tokens):
            next(greedy)
        prefill += middle - start
        decoding += time.perf_counter() - middle
    return {"ok": True, "prefill": prefill, "decoding": decoding}


def tokenize(model: Any, texts: list[str]) -> Reply:
    """Let llama.cpp's own tokenizer read `texts`; special tokens in them are recognised."""
    if not model.has_tokenizer:
        return {"ok": True, "plain": None, "special": None}
    plain, special = (
        [model.tokenize(text, add_special=add) for text in texts] for add in (False, True)
    )
    return {"ok": True, "plain": plain, "special": special}


if __name__ == "__main__":
    sys.exit(main())
