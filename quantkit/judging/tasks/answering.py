"""Both runtime workers answer what lm-eval asks of a model (docs/gate.md, "Tasks").

Letters of shapes: B rows of a request, T tokens of a row, V entries of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.judging.scoring import check_logits
from quantkit.judging.tasks.requests import Prompt, Reader, Span, read_request
from quantkit.judging.worker import Pair, Worker, are_tokens

REQUEST_TOKENS = 4096
"""Tokens of one request for logits, at the most (at least one row)."""
REQUEST_FLOATS = 1 << 25
"""Logits of one request, at the most: 128 MiB on disk (at least one row)."""
SCORE_FLOATS = 1 << 18
"""Logits that are scored at a time."""
FIRST_TOKENS = 32
"""New tokens that are asked for at first; then as many again as there are, until the text ends."""

Answers = Mapping[str, Any]
"""`key_of` a request -> what lm-eval expects as its answer."""
Tell = Callable[[int, int], None]
"""Called with (done, total) after each request to the workers."""

_Score = tuple[float, bool]
"""Log-probability of all targets, in nats, and whether each is the most probable token."""


def key_of(kind: str, arguments: Iterable[Any]) -> str:
    """Return what tells a request from every other one: its kind and all its arguments."""
    return json.dumps([kind, list(arguments)], sort_keys=True, ensure_ascii=False)


def answer_requests(
    pair: Pair,
    reader: Reader,
    requests: Iterable[tuple[str, Sequence[Any]]],
    folder: Path,
    tell: Tell,
) -> tuple[Answers, Answers]:
    """Ask both workers in step, and return the baseline's and the candidate's answers.

    Args:
        pair: both workers, with their models loaded.
        reader: the tokens of both.
        requests: (kind, arguments) as lm-eval makes them; equal ones are asked once.
        folder: for the files of logits, which are deleted after use.
        tell: hears of the progress.

    Raises:
        InputError: as `read_request`.
        WorkerError, ResourceError: as `Pair.answers`; or an answer is not what was asked for.
    """
    wanted = {key_of(kind, arguments): (kind, arguments) for kind, arguments in requests}
    read = {key: read_request(reader, *request) for key, request in wanted.items()}
    spans = {key: found for key, found in read.items() if not isinstance(found, Prompt)}
    prompts = {key: found for key, found in read.items() if isinstance(found, Prompt)}
    batches = list(_plan_batches({span for found in spans.values() for span in found}, reader))
    total = len(batches) + len(prompts)
    scores: tuple[dict[Span, _Score], dict[Span, _Score]] = ({}, {})
    for done, batch in enumerate(batches, start=1):
        for known, new in zip(scores, _score(pair, batch, reader, folder), strict=True):
            known.update(new)
        tell(done, total)
    answers: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for mine, known in zip(answers, scores, strict=True):
        for key, found in spans.items():
            parts = [known[span] for span in found]
            is_rolling = wanted[key][0] == "loglikelihood_rolling"
            mine[key] = sum(part[0] for part in parts) if is_rolling else parts[0]
    for done, (key, prompt) in enumerate(prompts.items(), start=len(batches) + 1):
        for mine, text in zip(answers, _continue(pair, prompt, reader), strict=True):
            mine[key] = text
        tell(done, total)
    return answers


def _plan_batches(spans: Iterable[Span], reader: Reader) -> Iterator[list[Span]]:
    """Put spans whose rows have one length together, within the limits of a request.

    The longest first: what is too much for the memory fails at once. Spans of one row, such as
    answers of one token, are scored on the same logits. Nothing is padded: some runtimes scale the
    inputs of a layer by all tokens of a request.
    """
    batch: list[Span] = []
    rows: set[tuple[int, ...]] = set()
    for span in sorted(spans, key=lambda span: (-len(span.ids), span.ids, span.targets)):
        length = len(span.ids)
        most = min(REQUEST_TOKENS // length, REQUEST_FLOATS // (length * reader.vocabulary))
        is_full = span.ids not in rows and len(rows) >= max(1, most)
        if batch and (is_full or len(batch[0].ids) != length):
            yield batch
            batch, rows = [], set()
        batch.append(span)
        rows.add(span.ids)
    if batch:
        yield batch


def _score(
    pair: Pair, batch: Sequence[Span], reader: Reader, folder: Path
) -> list[dict[Span, _Score]]:
    """Let both models read the rows of `batch`, and score its spans on the logits of each."""
    rows = {ids: row for row, ids in enumerate(dict.fromkeys(span.ids for span in batch))}
    files = [folder / f"{worker.role}-task.f32" for worker in pair.workers]
    # Only these positions are looked at: what a worker leaves out need not be written.
    last = max(len(span.targets) for span in batch)
    asked = {"op": "logits", "ids": list(rows), "last": last}
    pair.ask(asked | {"file": str(files[0])}, asked | {"file": str(files[1])})
    shape = (len(rows), len(batch[0].ids), reader.vocabulary)
    found = []
    for worker, answer, file in zip(pair.workers, pair.answers(), files, strict=True):
        logits = _open_logits(worker, answer, file, shape, last)
        found.append({span: _score_span(logits[rows[span.ids]], span) for span in batch})
        del logits
        file.unlink()
    return found


def _open_logits(
    worker: Worker, answer: Mapping[str, Any], file: Path, shape: tuple[int, int, int], last: int
) -> np.ndarray:
    """Return the logits float32 that a worker wrote, still on the disk.

    They are those of all positions, [B, T, V], or of the last ones, [B, last, V].
    """
    if answer.get("shape") == [shape[0], last, shape[2]]:
        shape = (shape[0], last, shape[2])
    check_logits(worker, answer, file, shape)
    if answer.get("finite") is not True:
        raise worker.error("answered logits with a NaN or an infinity on the text of a task")
    return np.memmap(file, dtype=np.float32, mode="r", shape=shape)


def _score_span(logits: np.ndarray, span: Span) -> _Score:
    """Score the targets of `span` on the last positions of its row `logits` [., V], in float64."""
    last = logits[len(logits) - len(span.targets) :]
    step = max(1, SCORE_FLOATS // logits.shape[1])
    total, is_greedy = 0.0, True
    for start in range(0, len(span.targets), step):
        part = np.asarray(last[start : start + step], dtype=np.float64)
        targets = np.asarray(span.targets[start : start + step])
        highest = part.max(axis=1)
        sums = highest + np.log(np.exp(part - highest[:, None]).sum(axis=1))
        total += float((part[np.arange(len(targets)), targets] - sums).sum())
        is_greedy = is_greedy and bool((part.argmax(axis=1) == targets).all())
    return total, is_greedy


def _continue(pair: Pair, prompt: Prompt, reader: Reader) -> list[str]:
    """Return how each model goes on, up to the first stop string.

    The workers know no stop strings: a few tokens are asked for, and more where the text goes on.
    """
    found: list[list[int]] = [[], []]
    texts = ["", ""]
    going = [0, 1]
    while going:
        requests = [_ask_more(prompt, found[which]) for which in going]
        if len(going) == 2:
            pair.ask(requests[0], requests[1])
            answers = pair.answers()
        else:
            answers = [pair.ask_one(going[0], requests[0])]
        following = []
        for which, request, answer in zip(going, requests, answers, strict=True):
            tokens = _read_tokens(pair.workers[which], answer)
            found[which] += tokens
            text = str(reader.tokenizer.decode(found[which], skip_special_tokens=True))
            texts[which] = _cut_text(text, prompt.stops)
            has_ended = len(tokens) < request["max_new_tokens"] or tokens[-1] in reader.ends
            is_full = len(found[which]) >= prompt.new_tokens
            if not has_ended and not is_full and texts[which] == text:
                following.append(which)
        going = following
    return texts


def _ask_more(prompt: Prompt, known: Sequence[int]) -> dict[str, Any]:
    count = min(max(FIRST_TOKENS, len(known)), prompt.new_tokens - len(known))
    return {"op": "generate", "prompt_ids": [*prompt.ids, *known], "max_new_tokens": count}


def _read_tokens(worker: Worker, answer: Mapping[str, Any]) -> list[int]:
    tokens = answer.get("ids")
    if not are_tokens(tokens):
        raise worker.error("answered a generation without token ids")
    return tokens


def _cut_text(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text
