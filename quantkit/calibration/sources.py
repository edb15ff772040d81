"""Where calibration and evaluation data comes from: one text, or rows of texts and chats."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit.checkpoint.mistaken import POINTER, recognise
from quantkit.errors import CalibrationError, nearest, unreadable

Kind = Literal["text", "jsonl", "parquet", "folder", "hub"]

KINDS: Mapping[str, Kind] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
"""Ending of a file -> how it is read."""

CALLERS = "an iterator of the caller"
"""What stands for the name of data that the caller of the API iterates over."""

MESSAGES = "messages"
"""Column of chats that is looked for beside the text column."""

MOST_ROW_BYTES = 16 << 20
"""Of one row: a text of four million tokens. It takes up to thirty times that in memory."""

_MOST_NAMES, _NAME_WIDTH = 20, 60
"""Columns that are listed in a message, and characters of each."""
_DATASET_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.+-]+)?")


@dataclass(frozen=True)
class Row:
    """One row: a text, or a chat's messages. `where` names it for errors: `file:line`."""

    where: str
    text: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    has_both: bool = False
    others: tuple[Any, ...] = ()
    """What it has in `Columns.others`, in their order."""
    domain: Any = None
    """What it has in `Columns.domain`."""


@dataclass(frozen=True)
class Rows:
    """Rows that are read one at a time, by index below `count`."""

    name: str
    count: int
    read: Callable[[int], Row]


@dataclass(frozen=True)
class Columns:
    """Which columns of a row are looked at: `text` first, then `messages`, or that one alone."""

    text: str
    messages_only: bool
    others: tuple[str, ...] = ()
    """More columns that every row must have; they may hold null."""
    domain: str | None = None
    """A column that names the kind of text; rows may lack it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that are looked at."""
        domain = () if self.domain is None else (self.domain,)
        return tuple(dict.fromkeys((self.text, MESSAGES, *self.others, *domain)))


def find_kind(data: str) -> Kind:
    """Tell what `data` names: a text, jsonl or parquet file, a folder, or a datasets id.

    Raises:
        CalibrationError: the file is missing, or of a kind that is not read.
    """
    path = Path(data)
    # os.path.exists answers False to names that the system refuses, Path.exists raises.
    if os.path.isdir(data):
        return "folder"
    if os.path.exists(data):
        return _kind_of_file(path)
    suffix = Path(data.partition(":")[0]).suffix
    looks_like_file = suffix[1:].isalpha() or os.path.isdir(path.parts[0] if path.parts else "")
    if _DATASET_ID.fullmatch(data) and not looks_like_file:
        return "hub"
    raise CalibrationError(_explain_missing(path))


def _kind_of_file(path: Path) -> Kind:
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        hint = " (one JSON object a line: rename it to .jsonl)" if path.suffix == ".json" else ""
        raise CalibrationError(
            f"{path}: data files end in {', '.join(KINDS)}, not in {path.suffix!r}{hint}"
        )
    if kind != "parquet" and path.is_file() and not path.stat().st_size:
        raise CalibrationError(f"{path} is empty: it holds no text; name a file with some")
    return kind


def _explain_missing(path: Path) -> str:
    message = f"no data file or folder {str(path)!r}"
    folder = path.parent
    if not os.path.isdir(folder):
        return f"{message}: there is no folder {str(folder)!r}"
    return message + (
        nearest(path.name, sorted(entry.name for entry in folder.iterdir()))
        or " (a datasets id is written org/name or org/name:config)"
    )


def read_text(path: Path) -> str:
    """Return a UTF-8 text file, its line ends read as `\\n` and without a byte order mark.

    Raises:
        CalibrationError: it cannot be read, is not UTF-8, or holds nothing but white space.
    """
    content = read_bytes(path)
    refuse_pointer(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CalibrationError(
            f"{path}:{line}: not UTF-8 text (byte {content[error.start]:#04x} at offset "
            f"{error.start}); save the file as UTF-8"
        ) from None
    if not text.strip():
        raise CalibrationError(f"{path} is empty: it holds no text; name a file with some")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def refuse_pointer(path: Path, head: bytes) -> None:
    """Refuse a file in whose place Git LFS has left a pointer, which is a text, too.

    Raises:
        CalibrationError: it begins as one.
    """
    if head.startswith(POINTER):
        raise CalibrationError(f"{path}: {recognise(head)}")


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a data file.

    Raises:
        CalibrationError: the system does not let it be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error, CalibrationError) from error


def check_columns(names: Iterable[str], columns: Columns, where: str) -> None:
    """Refuse data with neither the text column nor `messages`, or without one of the others.

    Raises:
        CalibrationError: it is not among `names`, which are listed.
    """
    names = list(names)
    wanted = [columns.text, MESSAGES]
    if not any(name in names for name in wanted):
        known = _list_names(names) or "none"
        raise CalibrationError(
            f"{where}: neither {columns.text!r} nor {MESSAGES!r} among the columns ({known})"
            f"{nearest(columns.text, names)}; set text_column"
        )
    for other in columns.others:
        if other not in names:
            known = _list_names(names)
            raise CalibrationError(f"{where}: no column {other!r} ({known}){nearest(other, names)}")


def check_domain(names: Iterable[str], columns: Columns, where: str) -> None:
    """Refuse data in which no row has the column that is to name the kind of text.

    Raises:
        CalibrationError: it is not among `names`, which are listed.
    """
    names = list(names)
    if columns.domain is not None and columns.domain not in names:
        known = _list_names(names)
        raise CalibrationError(
            f"{where}: no column {columns.domain!r} ({known}){nearest(columns.domain, names)}; "
            "set gate.domain_column"
        )


def _list_names(names: Iterable[str]) -> str:
    """The first names, for a message."""
    found = list(names)
    more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    shown = (repr(name[:_NAME_WIDTH]) for name in found[:_MOST_NAMES])
    return f"{', '.join(shown)}{more}"


def make_row(tree: Mapping[str, Any], columns: Columns, where: str) -> Row:
    """Make a `Row` of a mapping: its text column if it has one, else its messages.

    The text column may itself hold messages. Where only messages serve (`messages_only`), they
    come first.

    Raises:
        CalibrationError: the row has neither, or not in the expected form.
    """
    check_columns(tree, columns, where)
    order = (MESSAGES, columns.text) if columns.messages_only else (columns.text, MESSAGES)
    names = [name for name in dict.fromkeys(order) if name in tree]
    filled = [name for name in names if tree[name] is not None]
    name = (filled or names)[0]
    value = tree[name]
    has_both = len(filled) > 1
    others = tuple(tree[other] for other in columns.others)
    domain = None if columns.domain is None else tree.get(columns.domain)
    if isinstance(value, str) and not columns.messages_only:
        return Row(where, value, None, has_both, others, domain)
    if isinstance(value, str):
        raise CalibrationError(
            f"{where}: assistant_only needs rows with {MESSAGES!r}, and {name!r} is a plain text"
        )
    if isinstance(value, list | tuple) and _are_messages(value):
        return Row(where, None, tuple(value), others=others, domain=domain)
    raise CalibrationError(
        f"{where}: {name!r} is {_describe(value)}; expected a text, or a list of messages with "
        "'role' and 'content'"
    )


def _are_messages(value: list[Any] | tuple[Any, ...]) -> bool:
    return len(value) > 0 and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value
    )


def _describe(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        if not value:
            return "an empty list"
        first = value[0]
        keys = f" with keys {_list_names(first)}" if isinstance(first, Mapping) else ""
        return f"a list of {type(first).__name__}{keys}"
    return f"of type {type(value).__name__}"
