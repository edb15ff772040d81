"""The process's streams: what they cannot show is spelled out, what libraries say is cleaned."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from typing import TextIO

from quantkit.errors import printable
from quantkit.masking import hide_tokens

_SPELLED = {
    "→": "->",
    "←": "<-",
    "×": "x",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "·": "*",
    "•": "*",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "µ": "u",
    "μ": "u",
}
"""What our own words are written with beyond ASCII; letters of names are escaped instead."""
_ERRORS = "quantkit.spell"
_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_CURSOR_UP = "\x1b[A"
"""What progress bars of libraries move by, where there are several."""
_PLAIN_LOCALES = ("C", "POSIX")


def spell(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding does not have; a handler of errors for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_SPELLED.get(each) or ascii(each)[1:-1] for each in letters), error.end


codecs.register_error(_ERRORS, spell)


def settle_stream(stream: TextIO) -> None:
    """Let a stream take any text, and show ASCII alone where the user asks for no more."""
    if isinstance(stream, io.TextIOWrapper):
        encoding = "ascii" if stream.isatty() and _asks_for_ascii() else None
        stream.reconfigure(encoding=encoding, errors=_ERRORS)


def _asks_for_ascii() -> bool:
    """Whether the locale is C by the user's own word: Python would write UTF-8 all the same."""
    if os.environ.get("PYTHONUTF8") or os.environ.get("PYTHONIOENCODING"):
        return False
    names = ("LC_ALL", "LC_CTYPE", "LANG")
    return next(filter(None, map(os.environ.get, names)), "") in _PLAIN_LOCALES


def encode_json(text: str, stream: TextIO) -> str:
    """Return JSON that `stream` can hold as it is; a parser reads the same from it."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if encoding.lower().replace("-", "").startswith("utf"):
        return text
    return "".join(each if each.isascii() else json.dumps(each)[1:-1] for each in text)


class Murmur(io.TextIOBase):
    """Stands in for stdout and stderr: hands on what libraries write, plain and harmless."""

    def __init__(self, stream: TextIO, say: Callable[[str], object] | None = None) -> None:
        """Write to `stream`, or hand whole lines to `say`, which knows where they belong."""
        self.stream = stream
        self._say = say
        self._begun = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write without what a terminal acts upon, but for the moves of progress bars."""
        if self._say is None:
            parts = _COLOURS.sub("", hide_tokens(text)).split(_CURSOR_UP)
            self.stream.write(_CURSOR_UP.join(map(_clean, parts)))
            return len(text)
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            # Of a line that is written again and again, the last is what counts.
            last = line.rstrip("\r").rpartition("\r")[2]
            plain = _COLOURS.sub("", hide_tokens(last)).replace(_CURSOR_UP, "")
            self._say(plain.replace("\t", " "))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()

    def fileno(self) -> int:
        """That of the stream, for what writes past this object."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()

    def writable(self) -> bool:
        """Always."""
        return True


def _clean(part: str) -> str:
    """Make a text harmless; progress bars begin at the line's beginning again, or empty it."""
    if not part.strip():
        return printable(part, keep="\n\r\t")
    words = part.lstrip("\r")
    return "\r" * (len(part) - len(words)) + printable(words, keep="\n\t")


class Droppable(io.TextIOBase):
    """A stream for progress, which no job is lost for: what cannot be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        """Write to `stream`."""
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write, or do not."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or do not."""
        with contextlib.suppress(OSError):
            self.stream.flush()

    def fileno(self) -> int:
        """That of the stream."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()


def own(stream: TextIO) -> TextIO:
    """Return the stream behind what libraries are given, for our own clean text."""
    while isinstance(stream, Murmur):
        stream = stream.stream
    return stream
