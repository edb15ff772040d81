"""Calibration windows from whatever the caller iterates over: texts, ids, chats, batches.

Examples are taken one by one until the windows are full, so that an iterator may be endless, or
read from a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantkit.calibration import doctor
from quantkit.calibration.chat import EncodedRow, encode_chat
from quantkit.calibration.sources import CALLERS, Columns, make_row
from quantkit.calibration.tokenizer import encode_row
from quantkit.calibration.windows import cut_rows, hash_windows
from quantkit.errors import CalibrationError
from quantkit.records import TokenWindows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS = "a text, a list of token ids, a row with 'messages' or a text, or a batch with 'input_ids'"
_MOST_EMPTY = 10_000
"""Examples in a row without a token: behind so many nothing is expected any more."""


def collect_windows(
    examples: Iterable[object],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
    samples: int,
    sequence_length: int,
    vocabulary: int | None,
    assistant_only: bool = False,
    in_features: int | None = None,
) -> TokenWindows:
    """Take examples until they fill `samples` windows of `sequence_length` tokens.

    An example is a text, token ids (a list, an array or a tensor [L]), a row (a mapping with a
    text in `text_column` or with chat `messages`), or a batch: ids [B, L], or a mapping with
    `input_ids` [L] or [B, L] and maybe `attention_mask`, whose zeros leave a token out. Texts and
    chats are tokenised as those of a file are; ids are taken as they are. Examples are joined end
    to end and cut into windows in the order in which they come.

    Args:
        tokenizer: the model's; None: only ids can be taken.
        vocabulary: how many embeddings the model has; None: not known.
        assistant_only: weigh 0 what the assistant of a chat did not write; needs chats.
        in_features: widest input of the model's linear layers, for a note on too few tokens.

    Raises:
        CalibrationError: `examples` is no iterable of such, has too few tokens or ids that the
            model does not know, or raises; the example is named by its number, from 1.
    """
    if isinstance(examples, str | bytes | Mapping) or not isinstance(examples, Iterable):
        raise CalibrationError(
            f"calibration is of type {type(examples).__name__}: pass an iterable of examples, each "
            f"{_KINDS}; a file of them is named in the recipe, as calibration.data"
        )
    bos = None if tokenizer is None else tokenizer.bos_token_id
    tally = _Tally()
    rows = _encode(examples, tokenizer, text_column, vocabulary, assistant_only, tally)
    bos_weight = 0.0 if assistant_only else 1.0
    cut = cut_rows(rows, bos, samples, sequence_length, bos_weight=bos_weight)
    if not tally.taken:
        raise CalibrationError(f"calibration: {CALLERS} gave no examples")
    notes = doctor.check_amount(cut, CALLERS, samples, sequence_length, in_features)
    if tokenizer is not None:
        notes += doctor.check_special_tokens(cut.ids, tokenizer)
    if assistant_only and not cut.weights.any():
        raise CalibrationError(f"{CALLERS}: the assistant wrote none of the tokens")
    if tally.empty:
        notes.append(f"examples without a token that were left out: {tally.empty}")
    return TokenWindows(
        ids=cut.ids,
        weights=cut.weights,
        source=CALLERS,
        sha256=hash_windows(cut.ids, cut.weights),
        notes=tuple(f"{CALLERS}: {note}" for note in notes),
    )


@dataclass
class _Tally:
    """How many examples were taken, and how many of them had no token."""

    taken: int = 0
    empty: int = 0


def _encode(
    examples: Iterable[object],
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
    vocabulary: int | None,
    assistant_only: bool,
    tally: _Tally,
) -> Iterator[EncodedRow]:
    barren = 0
    for example in _guarded(examples, tally):
        where = f"calibration example {tally.taken}"
        barren += 1
        for row in _rows_of(example, tokenizer, text_column, assistant_only, where):
            if len(row.ids):
                _check_ids(row.ids, vocabulary, where)
                barren = 0
                yield row
        tally.empty += barren > 0
        if barren >= _MOST_EMPTY:
            raise CalibrationError(
                f"calibration: the last {barren:,} examples, up to number {tally.taken:,}, had no "
                f"tokens"
            )


def _guarded(examples: Iterable[object], tally: _Tally) -> Iterator[object]:
    """Yield the examples; what their own code raises is told as what it is."""
    try:
        for example in examples:
            tally.taken += 1
            yield example
    # The caller's own code may raise anything.
    except Exception as error:
        raise CalibrationError(
            f"calibration: {CALLERS} raised {type(error).__name__} after {tally.taken} examples: "
            f"{error}"
        ) from error


def _rows_of(
    example: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
    assistant_only: bool,
    where: str,
) -> Iterator[EncodedRow]:
    """Yield the rows of one example: several of a batch."""
    if isinstance(example, str):
        example = {text_column: example}
    if isinstance(example, Mapping) and "input_ids" not in example:
        yield _encode_row(example, tokenizer, text_column, assistant_only, where)
        return
    if assistant_only:
        raise CalibrationError(
            f"{where}: calibration.assistant_only needs rows with 'messages': ids do not say what "
            f"the assistant wrote"
        )
    mask = None
    if isinstance(example, Mapping):
        mask = example.get("attention_mask")
        example = example["input_ids"]
    ids = _as_array(example, where, "ids")
    counted = np.ones(ids.shape, dtype=bool)
    if mask is not None:
        counted = _as_array(mask, where, "attention_mask") != 0
        if counted.shape != ids.shape:
            raise CalibrationError(
                f"{where}: attention_mask has the shape {list(counted.shape)} and input_ids "
                f"{list(ids.shape)}"
            )
    for row, kept in zip(np.atleast_2d(ids), np.atleast_2d(counted), strict=True):
        found = row[kept].astype(np.int64)
        yield EncodedRow(found, np.ones(len(found), dtype=np.float32))


def _encode_row(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
    assistant_only: bool,
    where: str,
) -> EncodedRow:
    row = make_row(example, Columns(text_column, assistant_only), where)
    if tokenizer is None:
        raise CalibrationError(
            f"{where} is text and there is no tokenizer: pass tokenizer=, or token ids"
        )
    if row.messages is not None:
        return encode_chat(tokenizer, row.messages, where, assistant_only)
    text = row.text or ""
    if not text.strip():
        return EncodedRow(np.empty(0, np.int64), np.empty(0, np.float32))
    ids = encode_row(tokenizer, text, where=where)
    bos = tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return EncodedRow(ids, np.ones(len(ids), dtype=np.float32))


def _as_array(value: Any, where: str, what: str) -> np.ndarray:
    """Return whole numbers [L] or [B, L] as an array.

    Raises:
        CalibrationError: the value is something else.
    """
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        array = (plain.float() if plain.is_floating_point() else plain).numpy()
    elif isinstance(value, list | tuple | np.ndarray):
        try:
            array = np.asarray(value) if len(value) else np.empty(0, np.int64)
        except ValueError:
            array = None
    else:
        raise CalibrationError(f"{where} is of type {type(value).__name__}: expected {_KINDS}")
    numbers = "iubf" if what == "attention_mask" else "iu"
    if array is None or array.dtype.kind not in numbers or array.ndim not in (1, 2):
        shape = "rows of different lengths" if array is None else f"{array.dtype} {array.shape}"
        raise CalibrationError(
            f"{where}: {what} must be whole numbers, [L] or [B, L], and are {shape}: expected "
            f"{_KINDS}"
        )
    return array


def _check_ids(ids: np.ndarray, vocabulary: int | None, where: str) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        CalibrationError: one is negative, or not below `vocabulary`.
    """
    wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
    if wrong < 0 or (vocabulary is not None and wrong >= vocabulary):
        known = "ids begin at 0" if vocabulary is None else f"the model has {vocabulary} embeddings"
        raise CalibrationError(f"{where} has the id {wrong}, and {known}")
