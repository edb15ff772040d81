"""How the input of a group of layers is rounded: divided, bounded, and with which range.

Shapes: I input features, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quantkit.encoders.simulation import find_grid, round_to_codes
from quantkit.encoders.smoothing import choose_division, extremes
from quantkit.numerics.ranges import find_range
from quantkit.recipe import CalibrationSpec
from quantkit.records import LayerStats, LinearPlan
from quantkit.records.encoders import InputStats
from quantkit.solvers import FoldChoice

CLIP_MARGIN = 1.1
"""How much wider the bounds of a dynamic input are than what calibration has seen. On a sentence
encoder 1 % of 1,000 texts fell below a cosine of 0.9943 with 1, and of 0.9957 with 1.1 or 1.25,
and 1.25 kept fewer neighbours."""

_BINS = 2048


@dataclass(frozen=True)
class GroupInput:
    """How the input of a group is rounded. smoothing: float32 [I] or None.

    low, high: the range of the divided input; None where it is not known.
    """

    choice: FoldChoice | None
    low: float | None
    high: float | None
    static: bool
    fallback: str | None = None
    """Why the range is not the one that was asked for."""

    @property
    def smoothing(self) -> Tensor | None:
        """What the input is divided by."""
        if self.choice is None or self.choice.exponent is None:
            return None
        return self.choice.scale

    @property
    def clip(self) -> tuple[float, float] | None:
        """The bounds of a dynamic input."""
        if self.static or self.low is None or self.high is None:
            return None
        return CLIP_MARGIN * self.low, CLIP_MARGIN * self.high


def choose_input(
    linears: Sequence[LinearPlan],
    weights: Sequence[Tensor],
    stats: InputStats | None,
    calibration: CalibrationSpec | None,
) -> GroupInput:
    """Choose what the input is divided by, and the range that it is rounded in."""
    static = linears[0].scheme.static
    calibrated = any(linear.method.needs_calibration for linear in linears)
    if stats is None or not (static or calibrated):
        return GroupInput(None, None, None, static)
    choice = None
    if any(linear.method.transform == "smoothquant" for linear in linears):
        choice = choose_division(weights, stats, linears, 1.0 if static else CLIP_MARGIN)
    divided = stats
    if choice is not None and choice.exponent is not None:
        divided = divide(stats, choice.scale)
        weights = [weight * choice.scale for weight in weights]
    if not static:
        return GroupInput(choice, *whole_range(divided), static)
    spec = calibration if calibration is not None else CalibrationSpec(data="")
    (low, high), fallback = _static_range(divided, weights, spec)
    return GroupInput(choice, low, high, static, fallback)


def whole_range(stats: InputStats) -> tuple[float, float]:
    """Return the smallest and the largest value of all channels, and zero."""
    low, high = extremes(stats)
    return float(low.min()), float(high.max())


def _static_range(
    stats: InputStats, weights: Sequence[Tensor], spec: CalibrationSpec
) -> tuple[tuple[float, float], str | None]:
    """Return the range that the calibration asks for, or the whole one, and why.

    For `mse` a value counts as much as its channel's columns weigh: by what its rounding costs in
    the output. No range is taken that costs more there than the whole one: `entropy` cuts off the
    few large values by which encoders tell texts apart.
    """
    whole = whole_range(stats)
    if spec.range == "minmax" or not len(stats.sample) or not whole[0] < whole[1]:
        return whole, None
    columns = torch.stack([weight.square().sum(0) for weight in weights]).sum(0)
    counts, ends = stats.counts, (stats.minimum, stats.maximum)
    if spec.range == "mse" or not len(counts):
        importance = columns if spec.range == "mse" else torch.ones_like(columns)
        counts, ends = _count(stats.sample.clamp(*whole), importance, whole), whole
    if not counts.sum() > 0:
        return whole, None
    found = find_range(counts, *ends, spec.range, spec.percentile)

    def cost(ends: tuple[float, float]) -> float:
        grid = find_grid(*ends)
        error = round_to_codes(stats.sample, *grid).mul_(grid[0]).sub_(stats.sample)
        return float(error.double().square().sum(0) @ columns.double())

    if cost(found) <= cost(whole):
        return found, None
    return whole, f"range minmax: {spec.range} costs more on the calibration texts"


def _count(values: Tensor, importance: Tensor, ends: tuple[float, float]) -> np.ndarray:
    """Return the histogram of values [S, I] whose channels count as `importance` [I] says."""
    weights = importance.double().expand_as(values).reshape(-1).numpy()
    counts, _ = np.histogram(values.double().reshape(-1).numpy(), _BINS, ends, weights=weights)
    return counts


def divide(stats: InputStats, scale: Tensor) -> InputStats:
    """Return the statistics of an input that is divided by `scale` [I]."""
    low, high = extremes(stats)
    inverse = 1.0 / scale
    return replace(
        stats,
        second_moment=stats.second_moment * inverse * inverse.unsqueeze(1),
        mean=stats.mean * inverse,
        absmax=stats.absmax * inverse,
        minimum=float((low * inverse).min()),
        maximum=float((high * inverse).max()),
        # That of the quotients is not known.
        counts=np.zeros(0, np.int64),
        sample=stats.sample * inverse,
        lowest=low * inverse,
        highest=high * inverse,
    )


def layer_stats(stats: InputStats) -> LayerStats:
    """Return the same statistics as solvers take them."""
    return LayerStats(
        second_moment=stats.second_moment,
        tokens=stats.tokens,
        mean=stats.mean,
        absmax=stats.absmax,
        sample=stats.sample,
    )


def round_sample(stats: InputStats, rounding: GroupInput) -> Tensor:
    """Return what is left of the sample [S, I]; a dynamic range is that of all tokens."""
    whole = whole_range(stats)
    low = whole[0] if rounding.low is None else rounding.low
    high = whole[1] if rounding.high is None else rounding.high
    grid = find_grid(low, high)
    return round_to_codes(stats.sample, *grid).mul_(grid[0])


def add_noise(known: LayerStats, stats: InputStats, rounding: GroupInput) -> LayerStats:
    """Return statistics with the mean squares of the rounding errors on the diagonal."""
    if not len(stats.sample):
        return known
    noise = (round_sample(stats, rounding) - stats.sample).square_().mean(dim=0)
    moment = known.second_moment.clone()
    moment.diagonal().add_(noise)
    return replace(known, second_moment=moment)
