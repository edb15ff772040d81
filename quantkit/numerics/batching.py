"""How much of the data a forward takes at a time."""

from __future__ import annotations

_ON_DEVICE = 8192
"""Enough to fill a GPU."""

_FEWEST, _MOST = 1024, 4096
_VALUES = 1 << 19
"""Hidden states of a micro-batch, where the bounds allow. With much fewer, calls of torch take
longer than what they compute; with more, what a block makes of them in float32 takes new memory
each time (cli/process.py)."""


def tokens_at_once(hidden: int, *, on_device: bool) -> int:
    """Return the tokens of a micro-batch for a model of so many hidden features."""
    if on_device:
        return _ON_DEVICE
    return min(max(_FEWEST, _VALUES // hidden), _MOST)


def windows_at_once(hidden: int, length: int, *, on_device: bool) -> int:
    """Return the windows of `length` tokens of a micro-batch: one at least."""
    return max(1, tokens_at_once(hidden, on_device=on_device) // length)


def count_micro_batches(windows: int, hidden: int, length: int, *, on_device: bool) -> int:
    """Return how many micro-batches so many windows are; the last may be smaller."""
    return -(-windows // windows_at_once(hidden, length, on_device=on_device))
