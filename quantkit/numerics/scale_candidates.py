"""Scales to try for groups of weights, and what rounding to nearest makes of a group under each.

Absmax is always among the candidates, and a candidate is rounded to the stored dtype before it is
judged. The grid over shrunken ranges is AWQ's clip search (arXiv 2306.00978); trying several zero
points for every scale is NeUQI's (arXiv 2505.17595), here the three nearest to the centred one.

Shapes: R rows, G groups of g columns, C candidates, of which the first is what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from quantkit.numerics.affine import code_range, relative_steps, round_scale, round_values
from quantkit.schemes import Scheme


@dataclass(frozen=True)
class Grid:
    """The candidates of a search.

    low_bits, high_bits: scales relative to absmax of integer codes of up to four bits, and of more.
    They are bounded from below, since a scale that were free would collapse where the importance
    is concentrated on a few columns; with high bits clipping soon costs more than it gains.
    octave: the same for floating-point codes, whose steps grow with the weight, so that only the
    place within an octave matters. shifts: zero points relative to the one that centres the range.
    """

    low_bits: tuple[float, ...]
    high_bits: tuple[float, ...]
    octave: tuple[float, ...]
    shifts: tuple[int, ...]

    def factors(self, scheme: Scheme) -> tuple[float, ...]:
        """Return the factors for the codes of a scheme."""
        if scheme.weight_kind == "float":
            return self.octave
        return self.low_bits if scheme.weight_bits <= 4 else self.high_bits


FINE = Grid(
    low_bits=tuple(0.60 + 0.03 * step for step in range(16)),
    high_bits=(0.60, 0.70, 0.80, *(0.90 + 0.005 * step for step in range(25))),
    octave=tuple(2.0 ** (step / 32) for step in range(32)),
    shifts=(-1, 0, 1),
)
COARSE = Grid(
    low_bits=(0.74, 0.82, 0.90, 0.96),
    high_bits=(0.80, 0.90, 0.95, 0.98),
    octave=tuple(2.0 ** (step / 4) for step in range(4)),
    shifts=(0,),
)
"""Enough to tell which of two matrices is the easier to round."""


@dataclass(frozen=True)
class Part:
    """Rows to be searched.

    grouped: weights [R, G, g] divided by `unit`. unit: [R, G] or [R, 1]. channel: channel scales
    [R, G, g] or None. absmax: scales [R, G] in the stored dtype.
    """

    grouped: Tensor
    unit: Tensor
    channel: Tensor | None
    absmax: Tensor
    scheme: Scheme

    def take_group(self, group: int) -> Part:
        """Return one of the groups alone."""
        at = slice(group, group + 1)
        return Part(
            self.grouped[:, at],
            self.unit if self.unit.shape[1] == 1 else self.unit[:, at],
            None if self.channel is None else self.channel[:, at],
            self.absmax[:, at],
            self.scheme,
        )


@dataclass(frozen=True)
class Candidates:
    """Scales [C, R, G] in the stored dtype, and zero points int8 [C, R, G] or None."""

    scales: Tensor
    zero_points: Tensor | None

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scales and zero points [R, G] of the chosen candidates, int64 [R, G]."""
        index = chosen.unsqueeze(0)
        zero_points = self.zero_points
        return (
            self.scales.gather(0, index).squeeze(0),
            None if zero_points is None else zero_points.gather(0, index).squeeze(0),
        )


def list_candidates(part: Part, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Candidates:
    """Return those of a grid around the absmax scale, after the scales [R, G] that there are."""
    absmax = part.absmax.float()
    factors = absmax.new_tensor(grid.factors(part.scheme)).view(-1, 1, 1)
    scales = round_scale(absmax * factors, part.scheme, part.absmax.dtype)
    if zero_point is None:
        return Candidates(torch.cat([scale.unsqueeze(0), scales]), None)
    smallest, largest = code_range(part.scheme.weight_bits)
    centred = torch.round((smallest + largest) / 2 - _centre(part) / scales.float())
    shifts = absmax.new_tensor(grid.shifts).view(-1, 1, 1)
    offsets = (centred.unsqueeze(1) + shifts).clamp_(smallest, largest).to(torch.int8)
    return Candidates(
        torch.cat([scale.unsqueeze(0), scales.repeat_interleave(len(shifts), 0)]),
        torch.cat([zero_point.unsqueeze(0), offsets.flatten(0, 1)]),
    )


def shorten(part: Part, candidates: Candidates, importance: Tensor) -> Candidates:
    """Return the first, and a quarter of all others: each row those of the lowest sums v_j e_j^2.

    Args:
        importance: float32 [g], the weights v.
    """
    buffer = torch.empty_like(part.grouped)
    costs = [
        rounding_error(part, *each, buffer).square_().mul_(importance).sum(2)
        for each in _each(candidates)
    ]
    count = max(1, (len(costs) - 1) // 4)
    best = torch.stack(costs[1:]).topk(count, dim=0, largest=False).indices.add_(1)
    kept = torch.cat([torch.zeros_like(best[:1]), best])
    zero_points = candidates.zero_points
    return Candidates(
        candidates.scales.gather(0, kept),
        None if zero_points is None else zero_points.gather(0, kept),
    )


@dataclass(frozen=True)
class Choice:
    """Which candidate has the lowest loss in each group, the first of equals, int64 [R, G].

    first, best: the losses of the first candidate and of this one, [R, G].
    """

    chosen: Tensor
    first: Tensor
    best: Tensor


def choose(part: Part, candidates: Candidates, loss: Callable[[Tensor], Tensor]) -> Choice:
    """Try the candidates one after the other.

    A loss that is not a number is never the lowest, but where it is that of the first candidate.

    Args:
        loss: errors [R, G, g] in units, which it may destroy -> losses [R, G].
    """
    buffer = torch.empty_like(part.grouped)
    every = iter(_each(candidates))
    first = best = loss(rounding_error(part, *next(every), buffer))
    chosen = torch.zeros_like(first, dtype=torch.int64)
    for number, each in enumerate(every, 1):
        cost = loss(rounding_error(part, *each, buffer))
        better = cost < best
        best = torch.where(better, cost, best)
        chosen.masked_fill_(better, number)
    return Choice(chosen, first, best)


def _each(candidates: Candidates) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Pair scales [R, G] with their zero points, if there are any."""
    zero_points = candidates.zero_points
    return zip(
        candidates.scales, repeat(None) if zero_points is None else zero_points, strict=False
    )


def _centre(part: Part) -> Tensor:
    """Return the middle of the range of each group, which includes zero, [R, G]."""
    scaled = part.grouped if part.channel is None else part.grouped * part.channel
    return (scaled.amin(2).clamp(max=0.0) + scaled.amax(2).clamp(min=0.0)) * part.unit / 2


def rounding_error(
    part: Part, scale: Tensor, zero_point: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Round the weights to nearest; return dequantized minus original [R, G, g], in units."""
    step = relative_steps(scale, part.unit).unsqueeze(2)
    if part.channel is not None:
        step = step / part.channel
    values = torch.div(part.grouped, step, out=out)
    offset = None if zero_point is None else zero_point.float().unsqueeze(2)
    return round_values(values, part.scheme, offset).mul_(step).sub_(part.grouped)
