"""What lm-eval asks of a model, as tokens (docs/gate.md, "Tasks").

lm-eval knows three kinds of request: how probable a text is behind another one, how probable a
whole text is, and how the model goes on. Tokens are cut and put together as in lm-eval's own
model for transformers (`HFLM`), so that a score can be compared with one from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.calibration.tokenizer import read_json_object
from quantkit.errors import CheckpointError, InputError
from quantkit.judging.side_files import find_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POSITIONS = 2048
"""Where the config names none, as in lm-eval."""
NEW_TOKENS = 256
"""Where a task names no number, as in lm-eval."""

_POSITION_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
_GREEDY_KEYS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"})


@dataclass(frozen=True)
class Reader:
    """How text becomes tokens: as the baseline's tokenizer has them, for both models."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    positions: int
    """Tokens that the models read at the most."""
    prefix: int
    """The token before which there is nothing: BOS, or EOS where there is no BOS."""
    ends: frozenset[int]
    """Tokens that end a generation."""


@dataclass(frozen=True)
class Span:
    """Tokens whose probability is asked for."""

    ids: tuple[int, ...]
    """What the models read; its last `len(targets)` positions predict the targets."""
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """What the models go on with, greedily."""

    ids: tuple[int, ...]
    new_tokens: int
    stops: tuple[str, ...]
    """The text ends before the first of these."""


def make_reader(
    baseline: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    longest: int | None = None,
) -> Reader:
    """Return how the model in folder `baseline` reads text.

    Args:
        longest: tokens of a sequence that both runtimes take; None: they do not say.

    Raises:
        CheckpointError: it has no tokenizer, or one that has neither BOS nor EOS.
    """
    prefix = None if tokenizer is None else tokenizer.bos_token_id
    if tokenizer is not None and prefix is None:
        prefix = tokenizer.eos_token_id
    if tokenizer is None or not isinstance(prefix, int):
        raise CheckpointError(
            f"{baseline}: tasks need a tokenizer with a BOS or an EOS token, and there is none; "
            "leave gate.tasks empty"
        )
    config = read_json_object(baseline / "config.json")
    inner = config.get("text_config")
    found = [(inner if isinstance(inner, dict) else config).get(key) for key in _POSITION_KEYS]
    named = next((value for value in found if type(value) is int), POSITIONS)
    own = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    return Reader(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        positions=min(named, named if longest is None else longest),
        prefix=prefix,
        ends=find_ends(baseline) | own,
    )


def read_request(reader: Reader, kind: str, arguments: Sequence[Any]) -> tuple[Span, ...] | Prompt:
    """Return the tokens of a request: a prompt to go on with, or spans, whose sum is asked for.

    Args:
        kind: lm-eval's `request_type`.
        arguments: (context, continuation), (text,) or (context, options).

    Raises:
        InputError: it asks for sampling, or does not fit into the models' positions.
    """
    if kind == "loglikelihood":
        return (_cut(reader, *_encode_pair(reader, *arguments)),)
    if kind == "loglikelihood_rolling":
        return _cut_windows(reader, *arguments)
    if kind == "generate_until":
        return _read_prompt(reader, *arguments)
    raise InputError(f"a task asks for {kind!r}, which the gate does not answer")


def _encode(reader: Reader, text: str) -> list[int]:
    """Return the ids of `text` behind what the tokenizer puts before a text, unless it is there."""
    is_there = text.startswith(str(reader.tokenizer.decode([reader.prefix])))
    return _encode_plainly(reader, text, special=not is_there)


def _encode_plainly(reader: Reader, text: str, *, special: bool) -> list[int]:
    # Texts beyond the positions are cut, so the tokenizer need not warn of them.
    return list(reader.tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _encode_pair(reader: Reader, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of both; blanks at the end of the context belong to the continuation."""
    if not context:
        ids = _encode_plainly(reader, continuation, special=False)
        return (ids[:1], ids[1:]) if ids[:1] == [reader.prefix] else ([reader.prefix], ids)
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    before = _encode(reader, context)
    return before, _encode(reader, context + continuation)[len(before) :]


def _cut(reader: Reader, context: list[int], continuation: list[int]) -> Span:
    """Leave out the beginning of what is longer than the models' positions."""
    if not continuation:
        raise InputError("a task asks for the probability of a text without tokens")
    if len(continuation) > reader.positions:
        raise InputError(
            f"a task asks for the probability of {len(continuation)} tokens at once, and the "
            f"models have {reader.positions} positions"
        )
    whole = (context + continuation)[-(reader.positions + 1) :]
    return Span(tuple(whole[:-1]), tuple(continuation))


def _cut_windows(reader: Reader, text: str) -> tuple[Span, ...]:
    """Cut a text into windows in which each of its tokens is scored once, as lm-eval does."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        token_list=_encode(reader, text),
        prefix_token=reader.prefix,
        max_seq_len=reader.positions,
        context_len=1,
    )
    return tuple(
        _cut(reader, list(before), list(after))
        for before, after in map(make_disjoint_window, windows)
    )


def _read_prompt(reader: Reader, context: str, options: Mapping[str, Any]) -> Prompt:
    from lm_eval.models.utils import normalize_gen_kwargs

    given = normalize_gen_kwargs(dict(options), default_max_gen_toks=NEW_TOKENS)
    if given.get("do_sample"):
        raise InputError("a task asks for sampled text, and the gate compares greedy text only")
    if unknown := sorted(set(given) - _GREEDY_KEYS):
        raise InputError(
            f"a task sets {', '.join(unknown)} for its text, and the gate compares plain greedy "
            "text only"
        )
    new_tokens = int(given["max_gen_toks"])
    room = reader.positions - new_tokens
    if room < 1 or new_tokens < 1:
        raise InputError(
            f"a task asks for {new_tokens} new tokens, and the models have {reader.positions} "
            "positions"
        )
    end = reader.tokenizer.eos_token_id
    stops = [*given["until"], *([] if end is None else [str(reader.tokenizer.decode([end]))])]
    ids = _encode(reader, context)[-room:]
    return Prompt(tuple(ids), new_tokens, tuple(stop for stop in stops if stop))
