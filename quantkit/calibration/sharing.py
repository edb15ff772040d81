"""Calibration by several processes: each walks its windows, and all get the statistics of all.

What comes out is what one process would have found, but for the order in which sums of floats were
added: the windows of the ranks follow each other, and so do the tokens of their samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantkit.calibration.stats import SAMPLED_TOKENS, Moment, Sample, filled_panels
from quantkit.errors import CalibrationError
from quantkit.ranks import Ranks, gather, max_over, sum_over
from quantkit.records import KvStats, TokenWindows


@dataclass(frozen=True)
class WindowShare:
    """The windows of one rank; first_token: how many tokens count in those of the ranks before."""

    windows: TokenWindows
    first_token: int


@dataclass(frozen=True)
class _Part:
    """What a rank sends of its sums besides those; followed: whether it has seen the original."""

    weight: float
    tokens: int
    bfloat16: bool
    followed: bool
    sample: Sample


def share_windows(ranks: Ranks, windows: TokenWindows) -> WindowShare:
    """Return the windows that this rank walks.

    Raises:
        CalibrationError: there are fewer windows than ranks.
    """
    count = len(windows.ids)
    if count < ranks.size:
        raise CalibrationError(
            f"{count} calibration windows cannot be shared by {ranks.size} processes: raise "
            f"calibration.samples to {ranks.size} or more, or start fewer processes"
        )
    if ranks.size == 1:
        return WindowShare(windows, 0)
    mine = ranks.share(count)
    part = replace(
        windows,
        ids=windows.ids[mine],
        weights=windows.weights[mine],
        domains=None if windows.domains is None else windows.domains[mine],
        numbers=None if windows.numbers is None else windows.numbers[mine],
    )
    return WindowShare(part, int((windows.weights[: mine.start] > 0).sum()))


def combine_moments(ranks: Ranks, moment: Moment) -> None:
    """Make the sums of this rank those of all ranks, with the same bits on each.

    Args:
        moment: changed in place; `sample.seen` began at the rank's `first_token`.

    Raises:
        ResourceError: a rank has died.
    """
    if ranks.size == 1:
        return
    for panel in filled_panels(moment.total):
        sum_over(ranks, panel)
    sum_over(ranks, moment.first)
    max_over(ranks, moment.absmax)
    parts = gather(ranks, _describe(moment))
    moment.weight = sum(part.weight for part in parts)
    moment.tokens = sum(part.tokens for part in parts)
    moment.bfloat16 = all(part.bfloat16 for part in parts)
    if any(part.followed for part in parts):
        # A rank of which no token counted has none.
        if moment.drift is None:
            moment.drift = torch.zeros_like(moment.total)
        sum_over(ranks, moment.drift)
    moment.sample = _join([part.sample for part in parts])


def _describe(moment: Moment) -> _Part:
    followed = moment.drift is not None
    return _Part(moment.weight, moment.tokens, moment.bfloat16, followed, moment.sample)


def _join(samples: list[Sample]) -> Sample:
    """Return the sample of one stream that these are the parts of, in order.

    A part has at least the tokens that the sample of the whole has: its share is larger.
    """
    share = min(sample.share for sample in samples)
    phases = torch.cat([sample.phases for sample in samples])
    while int((phases < share).sum()) > SAMPLED_TOKENS:
        share /= 2
    seen = max(sample.seen for sample in samples)
    parts = [
        (sample.rows, sample.moved, sample.phases < share)
        for sample in samples
        if sample.rows is not None
    ]
    rows = [rows[kept.to(rows.device)] for rows, _, kept in parts if rows is not None]
    moved = [moved[kept.to(moved.device)] for _, moved, kept in parts if moved is not None]
    return Sample(
        rows=torch.cat(rows) if rows else None,
        moved=torch.cat(moved) if moved else None,
        phases=phases[phases < share],
        share=share,
        seen=seen,
    )


def combine_kv_stats(ranks: Ranks, stats: KvStats) -> KvStats:
    """Return the statistics of all ranks' keys and values, with the same bits on each.

    Raises:
        ResourceError: a rank has died.
    """
    if ranks.size == 1:
        return stats
    key, value = stats.key_absmax.clone(), stats.value_absmax.clone()
    errors = None if stats.key_errors is None else stats.key_errors.clone()
    max_over(ranks, key)
    max_over(ranks, value)
    if errors is not None:
        sum_over(ranks, errors)
    return KvStats(key, value, sum(gather(ranks, stats.tokens)), errors)
