"""The texts that an encoder is calibrated and judged on, as token ids.

Letters of shapes: B texts, T tokens of the longest one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from quantkit.calibration.doctor import MAX_SHARED
from quantkit.calibration.rows import open_rows
from quantkit.calibration.sources import Columns, find_kind, read_text
from quantkit.calibration.windows import draw
from quantkit.encoders.entries import (
    Entry,
    Tally,
    check_columns,
    read_entries,
    split_sentences,
)
from quantkit.errors import CalibrationError
from quantkit.records.encoders import EncoderInfo, TextRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Order = Literal["random", "sequential"]


def load_rows(
    data: str | os.PathLike[str],
    *,
    split: str,
    text_column: str,
    pair_column: str | None,
    label_column: str | None,
    tokenizer: PreTrainedTokenizerBase,
    info: EncoderInfo,
    samples: int,
    sequence_length: int,
    seed: int,
    order: Order = "random",
) -> TextRows:
    """Read `data` and tokenise at most `samples` texts of it, as the encoder will see them.

    Of a .txt file each line is taken apart into sentences: after `.`, `!` or `?` and white space,
    unless a small letter follows, and after their full-width forms. Pieces without a letter or a
    digit are left out. Of rows (.jsonl, .parquet, a datasets id or folder) `text_column` is one
    text, whole.

    With `pair_column`, a classifier reads both texts as one row, and an embedding model each of
    its own: `pairs` then holds the numbers of both. `label_column` holds the class (its name, or
    its number), or for embeddings the similarity of the pair, a number.

    A text longer than `sequence_length` and than the model's `max_length` is cut, as the tokenizer
    does it. Equal texts count once. What was cut, left out or missing is noted.

    Args:
        data: what to read.
        split: split of a datasets id or folder.
        text_column: column that holds the text.
        pair_column: column that holds the second text of a pair.
        label_column: column that holds the label.
        tokenizer: the model's own.
        info: what the model is.
        samples: texts, or pairs, that are wanted.
        sequence_length: tokens of a text, at the most.
        seed: which texts, and in which order, `random` means.
        order: `random` for calibration; `sequential` takes the first ones, for evaluation.

    Raises:
        CalibrationError: the data is missing, unreadable, or without a text, a label is none of the
            model, or a column is named that the task has no use for.
        MissingPackageError: the data needs a package that is not installed.
    """
    check_columns(info, pair_column, label_column)
    name = os.fspath(data)
    kind = find_kind(name)
    tally = Tally()
    if kind == "text":
        if pair_column is not None or label_column is not None:
            raise CalibrationError(
                f"{name} is a plain text, and {pair_column or label_column!r} is a column: give "
                f"rows (.jsonl, .parquet or a datasets id)"
            )
        texts = split_sentences(read_text(Path(name)))
        indices = _order(len(texts), seed, order)
        entries: Iterator[Entry] = (Entry(name, texts[index]) for index in indices)
    else:
        others = tuple(column for column in (pair_column, label_column) if column is not None)
        rows = open_rows(name, kind, split, Columns(text_column, False, others))
        name = rows.name
        indices = _order(rows.count, seed, order)
        entries = read_entries(
            (rows.read(int(index)) for index in indices), pair_column, label_column, info, tally
        )
    limit = min(sequence_length, info.max_length)
    collected = _collect(entries, tokenizer, info, samples, limit, tally)
    if not collected.ids:
        raise CalibrationError(f"{name} has no text: every row is empty")
    label = Path(name).name if os.path.exists(name) else name
    notes = _notes(tally, collected, tokenizer, samples, limit)
    return TextRows(
        ids=tuple(collected.ids),
        type_ids=tuple(collected.type_ids),
        labels=tuple(collected.labels),
        pairs=tuple(collected.pairs),
        source=name,
        sha256=_hash(collected),
        notes=tuple(f"{label}: {note}" for note in notes),
    )


def make_batches(
    rows: TextRows, info: EncoderInfo, batch_tokens: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Yield (numbers of texts, inputs) of batches of similar lengths, the longest texts first.

    Args:
        rows: the texts.
        info: names the inputs and the padding.
        batch_tokens: B x T of a batch, at the most; a longer text is a batch of its own.

    Yields:
        Inputs by name, int64 [B, T]; ids and types are padded, and the mask is 0 there.
    """
    order = sorted(range(len(rows.ids)), key=lambda index: -len(rows.ids[index]))
    start = 0
    while start < len(order):
        longest = len(rows.ids[order[start]])
        numbers = order[start : start + max(1, batch_tokens // longest)]
        start += len(numbers)
        yield (
            numbers,
            pad_texts(
                info,
                [rows.ids[number] for number in numbers],
                [rows.type_ids[number] for number in numbers],
            ),
        )


def pad_texts(
    info: EncoderInfo,
    ids: Sequence[Sequence[int]],
    type_ids: Sequence[Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Return texts as one batch, as the model takes it.

    Args:
        info: names the inputs and the padding.
        ids: of each text.
        type_ids: as long as its ids; None: all are 0.

    Returns:
        Inputs by name, int64 [B, T]; ids and types are padded, and the mask is 0 there.
    """
    shape = (len(ids), max(map(len, ids)))
    inputs = {
        "input_ids": np.full(shape, info.pad_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }
    for place, text in enumerate(ids):
        inputs["input_ids"][place, : len(text)] = text
        inputs["attention_mask"][place, : len(text)] = 1
        if type_ids is not None:
            inputs["token_type_ids"][place, : len(text)] = type_ids[place]
    return {name: inputs[name] for name in info.inputs}


def check_shared_texts(calibration: TextRows, evaluation: TextRows) -> tuple[str, ...]:
    """Refuse an evaluation on what calibration has seen; return a note on a few shared texts.

    Raises:
        CalibrationError: both are the same data, or share more than `MAX_SHARED` of the
            evaluation's texts.
    """
    remedy = "give gate.data texts that calibration has not seen"
    paths = (calibration.source, evaluation.source)
    same_file = all(map(os.path.exists, paths)) and os.path.samefile(*paths)
    if evaluation.sha256 == calibration.sha256 or paths[0] == paths[1] or same_file:
        raise CalibrationError(
            f"calibration and evaluation use the same data ({evaluation.source}): the verdict "
            f"would be flattered; {remedy}"
        )
    seen = set(calibration.ids)
    shared = sum(ids in seen for ids in evaluation.ids)
    if not shared:
        return ()
    found = f"{shared} of the evaluation's {len(evaluation.ids)} texts are calibration texts too"
    if shared > MAX_SHARED * len(evaluation.ids):
        raise CalibrationError(
            f"{found} ({evaluation.source}, {calibration.source}): at most {MAX_SHARED:.0%} may; "
            f"{remedy}"
        )
    return (found,)


@dataclass
class _Collected:
    """The texts so far; `places` finds one by its ids and types."""

    ids: list[tuple[int, ...]] = field(default_factory=list)
    type_ids: list[tuple[int, ...]] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = field(default_factory=dict)


def _order(count: int, seed: int, order: Order) -> Sequence[int]:
    return range(count) if order == "sequential" else [int(index) for index in draw(count, seed)]


def _collect(
    entries: Iterator[Entry],
    tokenizer: PreTrainedTokenizerBase,
    info: EncoderInfo,
    samples: int,
    limit: int,
    tally: Tally,
) -> _Collected:
    """Tokenise entries until there are `samples` different ones."""
    found = _Collected()
    seen: dict[tuple[int, ...], float | None] = {}
    for entry in entries:
        if len(seen) == samples:
            break
        apart = info.task == "embedding" and entry.second is not None
        texts = (
            [(entry.text, None), (entry.second, None)] if apart else [(entry.text, entry.second)]
        )
        fresh = [_encode(tokenizer, texts_of, entry.where, limit, tally) for texts_of in texts]
        if not all(ids for ids, _ in fresh):
            tally.empty += 1
            continue
        key = tuple(number for part in fresh for number in (*part[0], -1, *part[1], -2))
        if key in seen:
            tally.duplicates += 1
            tally.contradictions += seen[key] != entry.label
            continue
        seen[key] = entry.label
        numbers = [_place(found, part) for part in fresh]
        if apart:
            found.pairs.append((numbers[0], numbers[1]))
        if entry.label is not None:
            found.labels.append(entry.label)
    return found


def _place(found: _Collected, text: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    """Return the number of a text, which is a new one where there was no equal text."""
    number = found.places.setdefault(text, len(found.ids))
    if number == len(found.ids):
        found.ids.append(text[0])
        found.type_ids.append(text[1])
    return number


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[str | None, str | None],
    where: str,
    limit: int,
    tally: Tally,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids and types of a text or a pair of them, no more than `limit`."""
    given = [text for text in texts if text is not None]
    try:
        "".join(given).encode("utf-8")
    except UnicodeEncodeError:
        raise CalibrationError(
            f"{where}: the text has half of a surrogate pair; remove it"
        ) from None
    options: Mapping[str, Any] = {
        "return_token_type_ids": True,
        "return_attention_mask": False,
        "verbose": False,
    }
    encoded = tokenizer(*given, **options)
    if len(encoded["input_ids"]) > limit:
        tally.cut += 1
        encoded = tokenizer(*given, truncation=True, max_length=limit, **options)
    return tuple(encoded["input_ids"]), tuple(encoded["token_type_ids"])


def _notes(
    tally: Tally,
    found: _Collected,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    limit: int,
) -> Iterator[str]:
    count = len(found.pairs) or len(found.ids)
    if count < samples:
        yield f"only {count} of {samples} {'pairs' if found.pairs else 'texts'}"
    for amount, what in (
        (tally.empty, "empty rows that were left out"),
        (tally.unlabelled, "rows without a label that were left out"),
        (tally.duplicates, "texts that were there before and count once"),
        (tally.contradictions, "of these with another label, of which the first counts"),
        (tally.cut, f"texts longer than {limit} tokens, which were cut"),
    ):
        if amount:
            yield f"{what}: {amount}"
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        hits = sum(ids.count(unknown) for ids in found.ids)
        if hits:
            share = hits / sum(map(len, found.ids))
            yield f"unknown tokens ({tokenizer.unk_token}): {hits}, {share:.2%} of all"


def _hash(found: _Collected) -> str:
    digest = hashlib.sha256(f"texts {len(found.ids)}\n".encode())
    for rows in (found.ids, found.type_ids, found.pairs):
        for row in rows:
            digest.update(np.array([len(row), *row], dtype="<i8").tobytes())
    digest.update(np.array(found.labels, dtype="<f8").tobytes())
    return digest.hexdigest()
