"""Divide the channels of a group's input, so that one scale for all of them loses less.

SmoothQuant (arXiv 2211.10438) for inputs that have one range: what a channel is divided by, the
weights' columns are multiplied by. Candidates are judged by the output error on sampled tokens,
with inputs and weights rounded. The tokens of either half are rounded in the range of the other
half: a channel that is evened out by its largest value so far is clipped by the next larger one.

Shapes: O output features, I input features, S sampled tokens, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantkit.encoders.simulation import find_grid, round_to_codes
from quantkit.records import LinearPlan
from quantkit.records.encoders import InputStats
from quantkit.solvers.candidates import (
    FoldChoice,
    centre,
    relative,
    rounding_errors,
    sample_rows,
    split_candidates,
)

EXPONENTS = tuple(step / 10 for step in range(3, 11))
WEIGHT_EXPONENTS = (0.0, 0.2, 0.4)
LEAST_GAIN = 0.1
"""Share of the error that has to go: the division costs time wherever it is."""

_SAMPLED_ROWS = 192


def choose_division(
    weights: Sequence[Tensor], stats: InputStats, linears: Sequence[LinearPlan], margin: float
) -> FoldChoice:
    """Choose what the channels of an input are divided by.

    The candidates are s = max|x|^a / max|w|^(1 - a) for exponents a from 0.3 to 1, and
    s = max|x|^a / max|w|^b for the same a and b from 0 to 0.4.

    Args:
        weights: float32 [O_i, I] of the layers that read the input, quantized ones alone.
        stats: of the input.
        linears: one for each of `weights`.
        margin: by which the range is wider than that of the known tokens.

    Returns:
        The identity where no candidate lowers the error by a tenth.
    """
    low, high = extremes(stats)
    absmax = torch.maximum(high, -low)
    identity = torch.ones_like(absmax)
    # Every other token: they are in the order of the texts.
    halves = stats.sample[::2], stats.sample[1::2]
    if not len(halves[1]):
        return FoldChoice(identity, None, 0.0, 0.0)
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    named = list(_candidates(relative(absmax), relative(largest)))
    scales = torch.cat([identity.unsqueeze(0), centre(torch.stack([each for _, each in named]))])
    rows = sample_rows(weights, range(len(weights)), _SAMPLED_ROWS)
    losses = _losses(rows, linears[0], halves, scales, margin)
    best = int(losses.nan_to_num(nan=torch.inf).argmin())
    before, after = losses[[0, best]].tolist()
    # False, too, for a loss that is not a number.
    if after < (1 - LEAST_GAIN) * before:
        return FoldChoice(scales[best], named[best - 1][0], after, before)
    return FoldChoice(identity, None, before, before)


def extremes(stats: InputStats) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each channel, and zero: float32 [I] each."""
    if stats.lowest is None or stats.highest is None:
        return -stats.absmax, stats.absmax
    return stats.lowest.clamp(max=0.0), stats.highest.clamp(min=0.0)


def _candidates(absmax: Tensor, weight: Tensor) -> Iterator[tuple[float, Tensor]]:
    for exponent in EXPONENTS:
        for other in (1 - exponent, *WEIGHT_EXPONENTS):
            yield exponent, absmax**exponent / weight**other


def _losses(
    rows: Tensor, linear: LinearPlan, halves: tuple[Tensor, Tensor], scales: Tensor, margin: float
) -> Tensor:
    """Return the squared output error of both halves [S, I] for each of the scales [K, I]."""
    pairs = [(halves[0], halves[1]), (halves[1], halves[0])]
    outputs = [inputs @ rows.T for inputs in halves]
    losses = []
    for part in split_candidates(scales, rows, linear):
        errors = rounding_errors(rows, linear, torch.float32, None, part)
        for scale, error in zip(part, errors, strict=True):
            decoded = (rows + error) * scale
            loss = torch.zeros((), dtype=torch.float64)
            for (inputs, others), output in zip(pairs, outputs, strict=True):
                divided = others / scale
                grid = find_grid(margin * divided.min(), margin * divided.max())
                rounded = round_to_codes(inputs / scale, *grid).mul_(grid[0])
                loss += (output - rounded @ decoded.T).double().square().sum()
            losses.append(loss)
    return torch.stack(losses)
