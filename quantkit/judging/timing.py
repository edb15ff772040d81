"""One repetition of what decoders are timed at: a prompt, and tokens behind it one by one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.judging.worker import Worker

PROMPT_TOKENS = 256
NEW_TOKENS = 64
SHORTER = 8
"""By what both are divided where the model is too slow for `LONGEST_SECONDS`."""

LONGEST_SECONDS = 120.0
"""What all repetitions may take, about."""


@dataclass(frozen=True)
class Work:
    """What a worker does in one repetition: read `prompt` tokens, and go on by `new` ones."""

    prompt: int
    new: int
    vocabulary: int
    generator: bool = False
    """Whether onnxruntime-genai does it."""

    @property
    def shorter(self) -> Work:
        """For slow models."""
        return replace(self, prompt=max(1, self.prompt // SHORTER), new=max(1, self.new // SHORTER))

    @property
    def request(self) -> dict[str, Any]:
        """What a worker is asked; what the tokens are makes no difference."""
        ids = [token % self.vocabulary for token in range(self.prompt)]
        return {"op": "time", "ids": [ids], "new_tokens": self.new, "generator": self.generator}


def plan_work(workers: Sequence[Worker], loaded: Sequence[Mapping[str, Any]]) -> Work:
    """Return what all workers can do, by what they answered when they had loaded.

    Raises:
        WorkerError: one answered without the sizes of its model.
    """
    positions = sys.maxsize
    for worker, answer in zip(workers, loaded, strict=True):
        longest = answer.get("positions")
        for size in (answer.get("vocab"), positions if longest is None else longest):
            if not isinstance(size, int) or size < 1:
                raise worker.error("answered without the sizes of its model")
        positions = positions if longest is None else min(positions, longest)
    prompt = max(1, min(PROMPT_TOKENS, positions // 2))
    return Work(
        prompt=prompt,
        new=max(1, min(NEW_TOKENS, positions - prompt - 2)),
        vocabulary=min(answer["vocab"] for answer in loaded),
        generator=all(answer.get("generator") is True for answer in loaded),
    )


def read_durations(worker: Worker, answer: Mapping[str, Any]) -> tuple[float, float]:
    """Return the seconds of prefill and of decoding that a worker answered.

    Raises:
        WorkerError: it answered none.
    """
    found = []
    for name in ("prefill", "decoding"):
        seconds = answer.get(name)
        if not isinstance(seconds, float) or seconds <= 0:
            raise worker.error(f"answered {seconds!r} for a duration")
        found.append(seconds)
    return found[0], found[1]
