"""Calibration and evaluation data: from a file or a datasets id to windows of token ids."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from quantkit.calibration import doctor
from quantkit.calibration.chat import EncodedRow, encode_chat, marks_assistant, writes_date
from quantkit.calibration.domains import assign_domains, name_domain
from quantkit.calibration.rows import open_rows
from quantkit.calibration.sources import MESSAGES, Columns, Row, Rows, find_kind, read_text
from quantkit.calibration.templates import Apply, isolated
from quantkit.calibration.tokenizer import encode_row, encode_text, find_bos, load_tokenizer
from quantkit.calibration.windows import Cut, cut_rows, cut_text, draw, hash_windows
from quantkit.errors import CalibrationError
from quantkit.records import TokenWindows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer", "load_windows"]

Order = Literal["random", "sequential"]


def load_windows(
    data: str | os.PathLike[str],
    *,
    split: str,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int,
    assistant_only: bool = False,
    order: Order = "random",
    in_features: int | None = None,
    at_most: int | None = None,
    domain_column: str | None = None,
) -> TokenWindows:
    """Read `data` and cut it into at most `samples` windows of `sequence_length` tokens.

    A .txt file is one text. With `ids = tokenizer(text, add_special_tokens=False).input_ids` and
    T tokens a window, window i is `[bos] + ids[i * (T - 1) : (i + 1) * (T - 1)]` where the
    tokenizer itself starts a text with its BOS, else `ids[i * T : (i + 1) * T]`. The text is read
    as UTF-8 with line ends as `\\n`; a BOS that the text itself begins with is not repeated.

    Rows (.jsonl, .parquet, a datasets id `org/name` or `org/name:config`, a folder that
    `datasets` loads) have a text in `text_column`, tokenised as the tokenizer does it, or
    `messages`, rendered by the tokenizer's chat template. A row with both counts as a text, save
    with `assistant_only`. Rows are joined end to end and cut; where rows begin with BOS, so does
    every window. No window is padded and none overlap.

    Args:
        data: what to read.
        split: split of a datasets id or folder.
        text_column: column that holds the text (or the messages).
        tokenizer: the model's own.
        samples: windows wanted; fewer are given, with a note, where the data is short.
        sequence_length: tokens of a window.
        seed: which windows of a text, and which order of rows, `random` means.
        assistant_only: weigh 0 what the assistant of a chat did not write.
        order: `random` for calibration; `sequential` takes the first windows, for evaluation.
        in_features: widest input of the model's linear layers, for a note on too few tokens.
        at_most: windows that are given where the data holds more than `samples`; None: `samples`.
        domain_column: column that names a row's kind of text; None: windows have no domains.

    Raises:
        CalibrationError: the data is missing, unreadable, or shorter than one window, or it has no
            such columns.
        MissingPackageError: the data needs a package that is not installed.
    """
    if samples < 1 or sequence_length < 2:
        raise CalibrationError(
            f"samples is {samples} and sequence_length {sequence_length}: at least 1 window of 2 "
            "tokens is needed"
        )
    name = os.fspath(data)
    kind = find_kind(name)
    wanted = _Wanted(at_most or samples, sequence_length, seed if order == "random" else None)
    if kind == "text":
        _refuse_text(name, assistant_only, domain_column)
        cut, notes = _cut_text_file(Path(name), tokenizer, wanted)
    else:
        columns = Columns(text_column, assistant_only, domain=domain_column)
        rows = open_rows(name, kind, split, columns)
        name = rows.name
        cut, notes = _cut_rows(rows, tokenizer, wanted, columns)
    notes += doctor.check_amount(cut, name, samples, sequence_length, in_features)
    notes += doctor.check_special_tokens(cut.ids, tokenizer)
    domains: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    if domain_column is not None:
        domains, domain_names, found = assign_domains(cut, domain_column)
        notes += found
    label = Path(name).name if os.path.exists(name) else name
    return TokenWindows(
        ids=cut.ids,
        weights=cut.weights,
        source=name,
        sha256=hash_windows(cut.ids, cut.weights),
        notes=tuple(f"{label}: {note}" for note in notes),
        domains=domains,
        domain_names=domain_names,
    )


def _refuse_text(name: str, assistant_only: bool, domain_column: str | None) -> None:
    """Refuse a text file for what only rows can have."""
    kinds = "(.jsonl, .parquet or a datasets id)"
    if assistant_only:
        raise CalibrationError(
            f"assistant_only needs rows with {MESSAGES!r} {kinds}, and {name} is a plain text"
        )
    if domain_column is not None:
        raise CalibrationError(
            f"gate.domain_column {domain_column!r} needs rows {kinds}, and {name} is a plain text"
        )


@dataclass(frozen=True)
class _Wanted:
    samples: int
    sequence_length: int
    seed: int | None
    """None: in the order of the data."""


def _cut_text_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, wanted: _Wanted
) -> tuple[Cut, list[str]]:
    text = read_text(path)
    bos = find_bos(tokenizer)
    # In order, what lies behind the last wanted window need not be tokenised; one more token
    # than that, since a BOS of the text itself may be dropped.
    enough = wanted.samples * wanted.sequence_length + 1 if wanted.seed is None else None
    ids = encode_text(tokenizer, text, where=str(path), at_least=enough)
    notes = []
    if bos is not None and len(ids) and ids[0] == bos:
        ids = ids[1:]
        notes.append(f"the text itself begins with {tokenizer.bos_token}: not counted twice")
    return cut_text(ids, bos, wanted.samples, wanted.sequence_length, wanted.seed), notes


def _cut_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, wanted: _Wanted, columns: Columns
) -> tuple[Cut, list[str]]:
    assistant_only = columns.messages_only
    indices = np.arange(rows.count) if wanted.seed is None else draw(rows.count, wanted.seed)
    tally = _Tally()
    encoded = _encode_rows(rows, indices, tokenizer, columns, tally)
    cut = cut_rows(
        encoded,
        tokenizer.bos_token_id,
        wanted.samples,
        wanted.sequence_length,
        bos_weight=0.0 if assistant_only else 1.0,
    )
    notes = _note_rows(tally, tokenizer, assistant_only)
    if cut.long_rows:
        notes.append(
            f"rows longer than a window of {wanted.sequence_length} tokens: {cut.long_rows} of "
            f"{cut.rows}; each is cut and goes on in the next window"
        )
    if assistant_only and len(cut.weights):
        share = float(cut.weights.mean())
        if not share:
            raise CalibrationError(f"{rows.name}: the assistant wrote none of the tokens drawn")
        notes.append(f"the assistant wrote {share:.1%} of the tokens; only these count")
    return cut, notes


@dataclass
class _Tally:
    """What was met while rows were encoded."""

    empty: int = 0
    both: int = 0
    chats: int = 0
    double_bos: int = 0
    template_bos: bool = False


def _encode_rows(
    rows: Rows,
    indices: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    tally: _Tally,
) -> Iterator[EncodedRow]:
    bos = tokenizer.bos_token_id
    with isolated(tokenizer) as apply:
        for index in indices:
            row = rows.read(int(index))
            encoded = _encode_row(row, tokenizer, columns.messages_only, apply)
            if encoded is None:
                tally.empty += 1
                continue
            ids, weights = encoded.ids, encoded.weights
            if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
                ids, weights = ids[1:], weights[1:]
                tally.double_bos += 1
            tally.both += row.has_both
            if row.messages is not None:
                tally.chats += 1
                tally.template_bos |= bool(bos is not None and ids[0] == bos)
            domain = ""
            if columns.domain is not None:
                domain = name_domain(row.domain, row.where, columns.domain)
            yield EncodedRow(ids, weights, domain)


def _encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, assistant_only: bool, apply: Apply
) -> EncodedRow | None:
    if row.messages is not None:
        chat = encode_chat(tokenizer, row.messages, row.where, assistant_only, apply)
        return chat if len(chat.ids) else None
    if row.text is None or not row.text.strip():
        return None
    ids = encode_row(tokenizer, row.text, where=row.where)
    return EncodedRow(ids, np.ones(len(ids), dtype=np.float32)) if len(ids) else None


def _note_rows(
    tally: _Tally, tokenizer: PreTrainedTokenizerBase, assistant_only: bool
) -> list[str]:
    notes = []
    if tally.empty:
        notes.append(f"empty rows that were left out: {tally.empty}")
    if tally.both:
        notes.append(
            f"rows with both a text and {MESSAGES!r}: {tally.both}; the text was used (for the "
            f"chats set text_column to {MESSAGES})"
        )
    if tally.double_bos:
        notes.append(
            f"rows that would begin with {tokenizer.bos_token} twice: {tally.double_bos}; one "
            "was dropped from each"
        )
    if tally.template_bos and find_bos(tokenizer) is not None:
        notes.append(
            f"the chat template and the tokenizer both begin with {tokenizer.bos_token}: written "
            "once, by the template"
        )
    if tally.chats and writes_date(tokenizer):
        notes.append(
            "the chat template writes today's date: the same recipe gives other tokens on "
            "another day"
        )
    if assistant_only:
        how = (
            "marked by {% generation %} in the chat template"
            if marks_assistant(tokenizer)
            else "found by comparing renderings of the chat template with and without them"
        )
        notes.append(f"the assistant's turns were {how}")
    return notes
