"""Rows of the data of encoders: texts or pairs of them, with their labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quantkit.calibration.sources import MESSAGES, Row
from quantkit.errors import CalibrationError, nearest
from quantkit.records.encoders import EncoderInfo

# An end of a sentence is not followed by a small letter: "e.g. this" is no end.
_ENDS = re.compile(r"(?<=[.!?])\s+(?![a-z])|(?<=[\u3002\uff01\uff1f])|\n+")


@dataclass(frozen=True)
class Entry:
    """One row of the data: a text or a pair, and its label."""

    where: str
    text: str
    second: str | None = None
    label: float | None = None


@dataclass
class Tally:
    """What was met while rows were read."""

    empty: int = 0
    unlabelled: int = 0
    duplicates: int = 0
    cut: int = 0
    contradictions: int = 0


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each once, in their order; as `load_rows` says."""
    pieces = (piece.strip() for piece in _ENDS.split(text))
    return list(dict.fromkeys(piece for piece in pieces if any(map(str.isalnum, piece))))


def check_columns(info: EncoderInfo, pair_column: str | None, label_column: str | None) -> None:
    """Refuse columns that the task has no use for.

    Raises:
        CalibrationError: there is one.
    """
    if label_column is not None and info.task == "token-classification":
        raise CalibrationError(
            f"label_column {label_column!r}: labels of tokens are not read; without it, token "
            f"classification is judged by its agreement with the baseline"
        )
    if label_column is not None and info.task == "embedding" and pair_column is None:
        raise CalibrationError(
            f"label_column {label_column!r} is the similarity of two texts for embeddings: name "
            f"the column of the second one as text_pair_column"
        )


def read_entries(
    rows: Iterable[Row],
    pair_column: str | None,
    label_column: str | None,
    info: EncoderInfo,
    tally: Tally,
) -> Iterator[Entry]:
    """Yield the rows that have all that is asked for; count the others.

    Raises:
        CalibrationError: a text is none, or a label is none of the model's.
    """
    for row in rows:
        if row.messages is not None:
            raise CalibrationError(
                f"{row.where}: {MESSAGES!r} are chats, and an encoder reads texts: set text_column"
            )
        others = list(row.others)
        second = _as_text(others.pop(0), pair_column, row.where) if pair_column else None
        if _is_empty(row.text) or (pair_column and _is_empty(second)):
            tally.empty += 1
            continue
        label = None
        if label_column:
            label = _as_label(others.pop(0), info, row.where)
            if label is None:
                tally.unlabelled += 1
                continue
        yield Entry(row.where, str(row.text), second, label)


def _is_empty(text: str | None) -> bool:
    return text is None or not text.strip()


def _as_text(value: object, column: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise CalibrationError(f"{where}: {column!r} is of type {type(value).__name__}, not a text")


def _as_label(value: object, info: EncoderInfo, where: str) -> float | None:
    """Return the number of a class, or a similarity; None where the row has no label."""
    if value is None:
        return None
    number = float(value) if isinstance(value, int | float) else math.nan
    if len(info.labels) <= 1:
        if not math.isfinite(number):
            raise CalibrationError(f"{where}: the label {value!r} is not a number")
        return number
    if isinstance(value, str):
        if value not in info.labels:
            raise CalibrationError(
                f"{where}: the label {value!r} is none of the model's "
                f"({', '.join(info.labels[:8])}){nearest(value, info.labels)}"
            )
        return float(info.labels.index(value))
    if number not in {float(index) for index in range(len(info.labels))}:
        raise CalibrationError(
            f"{where}: the label {value!r} is no class: they are numbered from 0 to "
            f"{len(info.labels) - 1}"
        )
    return number
