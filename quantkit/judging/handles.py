"""Both models as a check of the user's own sees them, each in its worker process.

Letters of shapes: T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.calibration.tokenizer import encode
from quantkit.errors import QuantkitError
from quantkit.judging.probing.prompts import render_chat
from quantkit.judging.scoring import check_logits
from quantkit.judging.worker import Pair, are_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "the prompt of a check"
"""What messages call a text."""

CHUNK_FLOATS = 1 << 20
"""Logits that become log-probabilities at a time."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or a conversation of {"role", "content"} that the model is to answer."""


class Connection:
    """The line to both workers, which knows whether one of them failed, and when it is over."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.failure: QuantkitError | None = None
        self._pair = pair
        self._folder = folder
        self._lock = threading.RLock()
        self._closed = False

    def ask(self, which: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask worker 0 or 1, one request at a time, from whatever thread; as `Pair.ask_one`."""
        with self._lock:
            self._check_open()
            try:
                return self._pair.ask_one(which, request)
            except QuantkitError as error:
                self.failure = error
                raise

    def ask_logits(self, which: int, ids: Sequence[int], vocabulary: int) -> np.ndarray:
        """Return the logits float32 [T, V] of `ids`; as `ask`.

        Raises:
            ValueError: there is a NaN or an infinity among them.
        """
        role = self._pair.workers[which].role
        file = self._folder / f"{role}-check.f32"
        request = {"op": "logits", "ids": [list(ids)], "file": str(file)}
        with self._lock:
            answer = self.ask(which, request)
            try:
                check_logits(self._pair.workers[which], answer, file, (1, len(ids), vocabulary))
                if answer.get("finite") is not True:
                    raise ValueError(f"the {role}'s logits hold a NaN or an infinity")
                return np.fromfile(file, dtype=np.float32).reshape(len(ids), vocabulary)
            except QuantkitError as error:
                self.failure = error
                raise
            finally:
                file.unlink(missing_ok=True)

    def ask_ids(self, which: int, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Return the greedy continuation of `ids`; as `ask`."""
        request = {"op": "generate", "prompt_ids": list(ids), "max_new_tokens": new_tokens}
        found = self.ask(which, request).get("ids")
        if not are_tokens(found):
            self.failure = self._pair.workers[which].error("answered no token ids")
            raise self.failure
        return found

    def close(self) -> None:
        """Answer nothing from now on."""
        with self._lock:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("a handle is of use within its check only: its workers have ended")
        if self.failure is not None:
            raise self.failure


@dataclass(frozen=True)
class Text:
    """How text becomes tokens, for both models alike."""

    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int
    positions: int | None

    def find_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of a text, a conversation or ids, checked against what the models take.

        Raises:
            ValueError: there is no tokenizer or chat template, or the ids do not fit the models.
            TypeError: it is none of these.
            CalibrationError: the chat template refuses it, or a text cannot be encoded.
        """
        if isinstance(prompt, str):
            ids = encode(self.need_tokenizer(), prompt, special=True, where=PROMPT).ids.tolist()
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self._find_chat_ids(prompt)
        else:
            ids = [operator.index(token) for token in prompt]  # type: ignore[arg-type]
        if not ids:
            raise ValueError(f"{PROMPT} has no tokens")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ValueError(
                f"{PROMPT} has token {max(ids) if min(ids) >= 0 else min(ids)}, and the models "
                f"have {self.vocabulary}"
            )
        if self.positions is not None and len(ids) > self.positions:
            raise ValueError(
                f"{PROMPT} has {len(ids)} tokens, and the models take {self.positions}"
            )
        return ids

    def need_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            ValueError: there is none.
        """
        if self.tokenizer is None:
            raise ValueError("the baseline has no tokenizer: give token ids")
        return self.tokenizer

    def _find_chat_ids(self, messages: Sequence[Any]) -> list[int]:
        tokenizer = self.need_tokenizer()
        if not tokenizer.chat_template:
            raise ValueError("the baseline's tokenizer has no chat template: give a text")
        text = render_chat(tokenizer, [dict(message) for message in messages], PROMPT)
        return list(encode(tokenizer, text, special=False, where=PROMPT).ids.tolist())


@dataclass(frozen=True)
class ModelHandle:
    """One of the two models, loaded in its runtime. Answers are greedy: the same each time.

    A worker that dies, hangs or answers nonsense ends the check and fails the artifact, whatever
    the check does about the error.
    """

    role: str
    """`candidate`, the artifact, or `baseline`, the 16-bit original."""
    _connection: Connection
    _text: Text

    def generate(self, prompt: Prompt, max_new_tokens: int = 64) -> str:
        """Return how the model goes on with `prompt`, without special tokens.

        Args:
            prompt: a text, before which the tokenizer puts its BOS; a conversation, which the chat
                template writes, asking for an answer; or token ids.
            max_new_tokens: after which it is cut.

        Raises:
            ValueError: the prompt does not fit the models.
            WorkerError, ResourceError: as `Pair.ask_one`.
        """
        ids = self.generate_ids(prompt, max_new_tokens)
        return str(self._text.need_tokenizer().decode(ids, skip_special_tokens=True))

    def generate_ids(self, prompt: Prompt, max_new_tokens: int = 64) -> list[int]:
        """Return the new tokens, one that ends the answer included; as `generate`."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, and must be 1 or more")
        ids = self._text.find_ids(prompt)
        return self._connection.ask_ids(self._which, ids, int(max_new_tokens))

    def log_probabilities(self, prompt: Prompt) -> np.ndarray:
        """Return the log-probability of each token at each place behind `prompt`'s tokens.

        Args:
            prompt: as for `generate`.

        Returns:
            float32 [T, V] in nats: row t is what the model expects behind the first t + 1 tokens.

        Raises:
            ValueError: as `generate`; or a logit is not finite.
        """
        ids = self._text.find_ids(prompt)
        logits = self._connection.ask_logits(self._which, ids, self._text.vocabulary)
        step = max(1, CHUNK_FLOATS // self._text.vocabulary)
        for start in range(0, len(logits), step):
            part = logits[start : start + step].astype(np.float64)
            part -= part.max(axis=1, keepdims=True)
            part -= np.log(np.exp(part).sum(axis=1, keepdims=True))
            logits[start : start + step] = part
        return logits

    def token_log_probabilities(self, prompt: Prompt) -> np.ndarray:
        """Return float32 [T - 1] in nats: of each token behind those before it; as
        `log_probabilities`."""
        ids = np.array(self._text.find_ids(prompt))
        found = self.log_probabilities(ids.tolist())
        return found[np.arange(len(ids) - 1), ids[1:]]

    @property
    def _which(self) -> int:
        return 0 if self.role == "baseline" else 1


@dataclass(frozen=True)
class RuntimeHandle:
    """What a check of the user's own is given: the artifact and its original, both loaded."""

    candidate: ModelHandle
    baseline: ModelHandle
    artifact: Path
    """What the runtime has loaded: a folder or a file."""
    original: Path
    """Folder of the baseline."""
    runtime: str
    """Of the artifact: `transformers`, `vllm`, `llama.cpp` or `onnxruntime`."""
    tokenizer: PreTrainedTokenizerBase | None
    """The baseline's; None where it has none."""
    vocabulary: int
    """V, of both models."""
    positions: int | None
    """Tokens of a sequence that both take at the most; None where neither says."""

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a text or a conversation, as `ModelHandle.generate` reads it.

        Raises:
            ValueError: as `ModelHandle.generate`.
        """
        return Text(self.tokenizer, self.vocabulary, self.positions).find_ids(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included.

        Raises:
            ValueError: there is no tokenizer.
        """
        tokenizer = Text(self.tokenizer, self.vocabulary, self.positions).need_tokenizer()
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def make_handle(
    connection: Connection,
    text: Text,
    *,
    artifact: Path,
    original: Path,
    runtime: str,
) -> RuntimeHandle:
    """Return the handle of both workers behind `connection`."""
    return RuntimeHandle(
        candidate=ModelHandle("candidate", connection, text),
        baseline=ModelHandle("baseline", connection, text),
        artifact=artifact,
        original=original,
        runtime=runtime,
        tokenizer=text.tokenizer,
        vocabulary=text.vocabulary,
        positions=text.positions,
    )
