"""Applies chat templates, which are programs from elsewhere, where they cannot do harm.

transformers' sandbox keeps a template from files and from Python's inside. It bounds neither time
nor memory: loops within loops never end, and `"a" * 10**12` or `9 ** 9 ** 9` is one operation. So a
template runs in a forked process, of which the kernel bounds both; what comes back is JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from quantkit.errors import CalibrationError, CheckpointError
from quantkit.signals import signals_held

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

Apply = Callable[[Messages, Mapping[str, Any], str], Any]
"""Takes messages, options of `apply_chat_template` and words for a refusal; see `isolated`."""

MOST_SECONDS = 3.0
"""Of processor time for a conversation: a thousand turns take a tenth of a second."""
MOST_BYTES = 256 << 20
"""That a rendering may take: the longest conversations have a few million characters."""
_MOST_FILES = 1 << 16
"""Numbers of open files that are closed in the child."""


@dataclass(frozen=True)
class _Child:
    """A process that applies templates."""

    number: int
    questions: IO[bytes]
    answers: IO[bytes]


@contextmanager
def isolated(tokenizer: PreTrainedTokenizerBase) -> Iterator[Apply]:
    """Yield what applies the tokenizer's chat template in a process of its own.

    The process starts with the first conversation, and ends with this context.

    Raises:
        CalibrationError: by what is yielded: the template refuses a conversation, or trips over it.
        CheckpointError: by the same: the template takes too much time or memory.
    """
    children: list[_Child] = []

    def apply(messages: Messages, options: Mapping[str, Any], what: str) -> Any:
        if not hasattr(os, "fork"):
            return _explain(_answer(tokenizer, messages, options), what)
        if not children:
            with signals_held():
                children.append(_start(tokenizer))
        return _explain(_ask(children[0], messages, options), what)

    try:
        yield apply
    finally:
        for child in children:
            _end(child)


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Mapping[str, Any], what: str
) -> Any:
    """Apply the template to one conversation.

    Args:
        options: of transformers' `apply_chat_template`.
        what: begins the message of a refusal.

    Returns:
        The text, or with `tokenize` a mapping of lists.

    Raises:
        CalibrationError, CheckpointError: as `isolated`.
    """
    with isolated(tokenizer) as apply:
        return apply(messages, options, what)


def _explain(answer: Mapping[str, Any], what: str) -> Any:
    if "refusal" in answer:
        raise CalibrationError(f"{what}: {answer['refusal']}")
    return answer["value"]


def _answer(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Apply the template here."""
    from jinja2 import TemplateError

    try:
        found = tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    # These are what the mistakes of a template raise in jinja.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"refusal": reason[:1000]}
    return {"value": dict(found) if isinstance(found, Mapping) else found}


def _start(tokenizer: PreTrainedTokenizerBase) -> _Child:
    """Fork a process that answers until nobody asks any more."""
    theirs_in, questions = os.pipe()
    answers, theirs_out = os.pipe()
    with warnings.catch_warnings():
        # Python warns of locks that other threads may hold; the child runs a template alone.
        warnings.simplefilter("ignore", DeprecationWarning)
        number = os.fork()
    if not number:
        try:
            _serve(tokenizer, theirs_in, theirs_out)
        finally:
            os._exit(1)
    os.close(theirs_in)
    os.close(theirs_out)
    return _Child(number, os.fdopen(questions, "wb"), os.fdopen(answers, "rb"))


def _serve(tokenizer: PreTrainedTokenizerBase, reading: int, writing: int) -> None:
    """What the child does: answer, within bounds, until the questions end."""
    # A lock that is held by an open file would be held by the child as well.
    low = 3
    for kept in sorted((reading, writing)):
        os.closerange(low, kept)
        low = kept + 1
    os.closerange(low, _MOST_FILES)
    for name in ("SIGPROF", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    # A terminal sends these to the parent too, which ends the child.
    for name in ("SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    questions, answers = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
    _bound_memory()
    while True:
        try:
            messages, options = pickle.load(questions)
        except EOFError:
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        line = json.dumps(_answer(tokenizer, messages, options))
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(line.encode() + b"\n")
        answers.flush()


def _bound_memory() -> None:
    """Let a template that asks for all memory fail alone."""
    import resource

    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    with suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, hard))


def _ask(child: _Child, messages: Messages, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        question = pickle.dumps(([dict(message) for message in messages], dict(options)))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        return {"refusal": f"it is not made of plain values: {error}"}
    with suppress(BrokenPipeError):
        child.questions.write(question)
        child.questions.flush()
    line = child.answers.readline()
    if not line.endswith(b"\n"):
        raise CheckpointError(
            f"the model's chat template takes more than {MOST_SECONDS:g} seconds or "
            f"{MOST_BYTES >> 20} MiB for one conversation, and was stopped: repair the template, "
            f"or use data without chats"
        )
    found: dict[str, Any] = json.loads(line)
    return found


def _end(child: _Child) -> None:
    with suppress(OSError):
        child.questions.close()
    child.answers.close()
    # It may still be at work where nobody waited for the answer.
    with suppress(ProcessLookupError):
        os.kill(child.number, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(child.number, 0)
