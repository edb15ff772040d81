"""Judging worker for ONNX Runtime: a script, run as `python onnxruntime_worker.py`.

It runs under the interpreter that has onnxruntime, and onnxruntime-genai where the artifact is made
for it; besides these it imports the standard library and numpy only. Requests and answers are those
of transformers_worker.py, one line of JSON each, with these differences:

    {"op": "load", "path", "device", "threads"}: `path` is an ONNX file, or a folder that holds one
        -> "dtype" is that of the graph's logits, "device" is always "cpu", "generator" says whether
            onnxruntime-genai runs the folder: whether it has a genai_config.json; "positions" is
            the length of the longest sequence
    {"op": "tokenize", "texts": [...]}
        -> {"ok": true, "plain": [[...], ...], "special": [[...], ...]}, what onnxruntime-genai's
            own tokenizer makes of the texts, without and with what it adds to a prompt when it is
            asked to; both null where there is no genai_config.json
    {"op": "time", "ids": [[...], ...], "new_tokens", "generator"}
        -> {"ok": true, "prefill", "decoding"}: seconds that `ids` [B, T] took at once, and the
            `new_tokens` greedy steps behind them together; by onnxruntime-genai, which holds
            the model alone until the next one is loaded, or by this script

Logits are those of the graph itself on a CPU: every window with an empty cache, its ids and nothing
before them. A graph is one that onnxruntime-genai's builder and Optimum make: input_ids,
attention_mask and position_ids as far as it asks for them, past_key_values.N.key and .value;
logits of every position, present.N.key and .value.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

# Run by its path, the script is part of no package, and PYTHONSAFEPATH hides its folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from onnxruntime_graph import (  # type: ignore[import-not-found]
    describe,
    find_file,
    read_config,
    run,
    told_in_one_line,
)
from worker_protocol import FAILURES, find_versions, serve  # type: ignore[import-not-found]

CHUNK_FLOATS = 1 << 24
"""Logits that are converted and written at a time."""

PACKAGES = ("onnxruntime", "onnxruntime-genai")
"""Whose versions the evidence names."""

OUT_OF_MEMORY = "allocate memory"
"""Words of ONNX Runtime."""

Reply = dict[str, Any]


def main() -> int:
    """Serve requests from standard input until it ends."""
    decoder: Any = None

    def answer(request: Reply) -> Reply:
        nonlocal decoder
        if request["op"] == "load":
            # The last one's memory is given back first.
            decoder = None
            decoder, reply = load(Path(request["path"]), request["threads"])
            return reply
        if request["op"] == "logits":
            return write_logits(decoder, request["ids"], request["file"], request.get("last", 0))
        if request["op"] == "generate":
            return generate(decoder, request["prompt_ids"], request["max_new_tokens"])
        if request["op"] == "continue":
            room = request["max_new_tokens"]
            answers = [generate(decoder, prompt, room) for prompt in request["prompts"]]
            return {"ok": True, "ids": [answer["ids"] for answer in answers]}
        if request["op"] == "tokenize":
            return tokenize(decoder, request["texts"])
        if request["op"] == "time":
            if request["generator"]:
                decoder = replace(decoder, session=None)
            return measure(
                decoder, request["ids"], request["new_tokens"], generator=request["generator"]
            )
        return {"ok": True}

    return int(serve(answer, FAILURES, OUT_OF_MEMORY, PACKAGES))


def load(path: Path, threads: int) -> tuple[Any, Reply]:
    """Load the graph at `path` and say what it became.

    Raises:
        ImportError: onnxruntime, or for a folder of its onnxruntime-genai, is not there.
        ValueError: there is no graph, ONNX Runtime refuses it, or it is not such a decoder.
    """
    # Both packages collect usage data unless this is set before they are imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    file = find_file(path)
    config = read_config(file)
    if config:
        # Where it is missing, that is told before anything is measured.
        import onnxruntime_genai  # noqa: F401
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with told_in_one_line(file):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    decoder = describe(session, file, config, threads)
    return decoder, {
        "ok": True,
        "vocab": decoder.vocabulary,
        "dtype": decoder.dtype,
        "device": "cpu",
        "generator": decoder.generator,
        "positions": decoder.positions,
        # ONNX Runtime itself refuses a graph whose weights are missing or have another shape.
        "unexpected": [],
        "versions": find_versions(*PACKAGES),
    }


def write_logits(decoder: Any, ids: list[list[int]], file: str, last: int) -> Reply:
    """Write the logits of the `last` positions of `ids` [B, T], or of all for 0, in chunks."""
    logits = run(decoder, np.array(ids, np.int64))[0][:, -last:]
    rows = logits.reshape(-1, logits.shape[-1])
    step = max(1, CHUNK_FLOATS // rows.shape[1])
    finite = True
    with open(file, "wb") as handle:
        for start in range(0, len(rows), step):
            chunk = np.ascontiguousarray(rows[start : start + step], np.float32)
            finite = finite and bool(np.isfinite(chunk).all())
            handle.write(chunk.data)
    return {"ok": True, "shape": list(logits.shape), "finite": finite}


def generate(decoder: Any, prompt_ids: list[int], max_new_tokens: int) -> Reply:
    """Continue `prompt_ids` with the most probable tokens, within the model's positions."""
    room = min(max_new_tokens, decoder.positions - len(prompt_ids))
    found: list[int] = []
    if room < 1:
        return {"ok": True, "ids": found}
    if decoder.generator:
        generator = _make_generator(decoder, 1, len(prompt_ids) + room, 0)
        generator.append_tokens(np.array(prompt_ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return {"ok": True, "ids": found}
    for step in _continue_greedily(decoder, np.array([prompt_ids], np.int64)):
        found.append(int(step[0, 0]))
        if len(found) == room or found[-1] in decoder.stops:
            break
    return {"ok": True, "ids": found}


def _continue_greedily(decoder: Any, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the most probable next tokens [B, 1] behind `ids` [B, T], step by step."""
    past = None
    while True:
        logits, *kept = run(decoder, ids, past, keep=True)
        step = logits[:, -1:].argmax(axis=-1)
        # A graph without a cache reads everything again.
        ids, past = (step, kept) if kept else (np.concatenate([ids, step], axis=1), None)
        yield step


def _make_generator(decoder: Any, rows: int, length: int, at_least: int) -> Any:
    """A greedy generator of onnxruntime-genai, whatever genai_config.json asks for.

    Args:
        rows: prompts that are continued at a time.
        length: tokens of a prompt and its continuation, at the most.
        at_least: how many there must be before one may end.
    """
    import onnxruntime_genai

    if not decoder.models:
        config = onnxruntime_genai.Config(str(decoder.path.parent))
        config.clear_providers()
        options = {"intra_op_num_threads": decoder.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        decoder.models.append(onnxruntime_genai.Model(config))
    (model,) = decoder.models
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(
        batch_size=rows,
        max_length=length,
        min_length=at_least,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    return onnxruntime_genai.Generator(model, parameters)


def tokenize(decoder: Any, texts: list[str]) -> Reply:
    """Let onnxruntime-genai's own tokenizer read `texts`; special tokens are recognised."""
    if not decoder.generator:
        return {"ok": True, "plain": None, "special": None}
    import onnxruntime_genai

    tokenizer = onnxruntime_genai.Tokenizer(str(decoder.path.parent))
    found = []
    for add in ("false", "true"):
        tokenizer.update_options(add_special_tokens=add)
        found.append([[int(token) for token in tokenizer.encode(text)] for text in texts])
    return {"ok": True, "plain": found[0], "special": found[1]}


def measure(decoder: Any, ids: list[list[int]], new_tokens: int, *, generator: bool) -> Reply:
    """Time one pass over `ids` [B, T] and `new_tokens` greedy steps behind it."""
    tokens = np.array(ids, np.int64)
    rows, length = tokens.shape
    if generator:
        whole = length + new_tokens
        steps = _make_generator(decoder, rows, whole + 1, whole + 1)
        start = time.perf_counter()
        steps.append_tokens(tokens.astype(np.int32))
        steps.generate_next_token()
        middle = time.perf_counter()
        for _ in range(new_tokens):
            steps.generate_next_token()
    else:
        greedy = _continue_greedily(decoder, tokens)
        start = time.perf_counter()
        next(greedy)
        middle = time.perf_counter()
        for _ in range(new_tokens):
            next(greedy)
    end = time.perf_counter()
    return {"ok": True, "prefill": middle - start, "decoding": end - middle}


if __name__ == "__main__":
    sys.exit(main())
