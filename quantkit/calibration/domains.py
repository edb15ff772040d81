"""Kinds of text: which one each token of a window is of (docs/gate.md, "Domains").

Letters of shapes: N windows, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantkit.calibration.windows import Cut
from quantkit.errors import CalibrationError

MOST_DOMAINS = 32
"""Where there are more, the rare ones are shown as one."""
OTHER = "other"
NONE_NAMED = "none named"

_LONGEST_NAME = 60


def name_domain(value: object, where: str, column: str) -> str:
    """Return the name of the kind of text that a row's cell holds.

    Raises:
        CalibrationError: it holds something other than a text, a number or nothing.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return NONE_NAMED
    if not isinstance(value, str | int | float):
        raise CalibrationError(
            f"{where}: {column!r} is of type {type(value).__name__}; gate.domain_column needs a "
            "column of texts or numbers"
        )
    text = " ".join(str(value).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def assign_domains(cut: Cut, column: str) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """Return the domain of each token, the domains' names and notes.

    Domains come by their number of tokens, falling. Of more than `MOST_DOMAINS` the last is
    `OTHER`, which has all that are not among the first.

    Args:
        cut: windows of rows, each with its domain.
        column: where the names are from.

    Returns:
        int16 [N, T], names, notes.
    """
    names = sorted(set(cut.domains))
    index = {name: number for number, name in enumerate(names)}
    of_row = np.array([index[name] for name in cut.domains], dtype=np.int64)
    of_token = of_row[cut.row_of]
    sizes = np.bincount(of_token.ravel(), minlength=len(names))
    # Rows at the end of what was read may have no token in a window.
    ranked = [int(number) for number in np.argsort(-sizes, kind="stable") if sizes[number]]
    kept, notes = _keep_largest(ranked, names, column)
    place = np.full(len(names), len(kept), dtype=np.int16)
    place[kept] = np.arange(len(kept))
    shown = [_shorten(names[number]) for number in kept]
    if len(kept) < len(ranked):
        shown.append(OTHER)
    unnamed = cut.domains.count(NONE_NAMED)
    if unnamed:
        notes.append(
            f"rows without a value in {column!r}: {unnamed} of {cut.rows}; they are shown as "
            f"{NONE_NAMED!r}"
        )
    return place[of_token], tuple(shown), notes


def _keep_largest(
    ranked: Sequence[int], names: Sequence[str], column: str
) -> tuple[list[int], list[str]]:
    """Return which domains are shown apart, and a note where some are not."""
    if len(ranked) <= MOST_DOMAINS:
        return list(ranked), []
    kept = [number for number in ranked if names[number] != OTHER][: MOST_DOMAINS - 1]
    note = (
        f"{column!r} has {len(ranked)} values: the {len(kept)} with the most tokens are shown "
        f"apart, and all others as {OTHER!r}"
    )
    return kept, [note]


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
