"""Text from others made safe to show: control characters removed, Markdown escaped."""

from __future__ import annotations

import re

# Control characters (but tab and newline), lone surrogates, the two non-characters that XML
# forbids, and the marks that reorder text on the screen.
_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)
# An underscore inside of a word is no markup; a number begins a list only before ". ".
_INLINE_MARKUP = re.compile(r"([\\`*\[\]<>#|~&$]|(?<![^\W_])_|_(?![^\W_]))")
# Where GitHub would see a name that is addressed, or a link.
_LINK = re.compile(r"(?<=@)|(?<=:)(?=//)|(?<=www)(?=\.)")
_BLOCK_MARKUP = re.compile(r"^([-+=]|\d+(?=[.)](?:\s|$)))")
_ZERO_WIDTH_SPACE = "\u200b"


def clean(text: str) -> str:
    """Replace each character that cannot be shown with U+FFFD; tabs and newlines stay."""
    return _UNSHOWABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def clean_line(text: str) -> str:
    """As `clean`, on one line: runs of white space become one space."""
    return clean(" ".join(text.split()))


def escape_markdown(text: str) -> str:
    """Return one line of Markdown that shows `text` as it is, in a table cell too.

    Every character that could start markup is escaped; an `@` cannot address anybody, and nothing
    becomes a link.
    """
    escaped = _INLINE_MARKUP.sub(r"\\\1", clean_line(text))
    escaped = _BLOCK_MARKUP.sub(_escape_block, escaped)
    return _LINK.sub(_ZERO_WIDTH_SPACE, escaped)


def _escape_block(match: re.Match[str]) -> str:
    """`- x` and `1. x` would begin a list: `\\- x`, `1\\. x` do not."""
    found = match.group(1)
    return f"\\{found}" if not found[0].isdigit() else f"{found}\\"


def code_span(text: str, *, in_table: bool = False) -> str:
    """Return `text` as inline code, fenced with more backticks than it contains in a row."""
    line = clean_line(text)
    if in_table:
        line = line.replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if not line or line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Return `text` verbatim as a fenced block that nothing in the text can close."""
    body = clean(text).rstrip("\n")
    fence = "`" * max(3, _longest_run(body) + 1)
    return f"{fence}{language}\n{body}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
