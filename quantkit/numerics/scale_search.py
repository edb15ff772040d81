"""Searches for the scales (and zero points) of groups, by what rounding to nearest then costs.

Two objectives, each for the rounder that comes after it:

- `search_scales`: sum_j v_j e_j^2 within a group, for error-compensated rounding, where v_j is the
  curvature that is left of column j once the columns rounded later make up for it;
- `search_scales_jointly`: e H e^T of the whole row, for rounding to nearest, one group after the
  other with the errors of all other groups taken into account.

Absmax is always among the candidates, and a candidate is rounded to the stored dtype before it is
judged. The grid over shrunken ranges is AWQ's clip search (arXiv 2306.00978); trying several zero
points for every scale is NeUQI's (arXiv 2505.17595), here the three nearest to the centred one.

Shapes: O output features, I input features, G groups of g columns, R rows treated at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from quantkit.numerics.affine import (
    choose_group_absmax,
    code_range,
    group_weights,
    relative_steps,
    round_scale,
    round_values,
    row_units,
)
from quantkit.numerics.cheapest import cheapest_scales, chooses_cheapest
from quantkit.numerics.precision import quick_products
from quantkit.schemes import BLOCK_SIZE, Scheme


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

_GROUP_ELEMENTS = 1 << 16
_MOST_ELEMENTS = 1 << 22
"""Weights of a group, and of all groups, at a time of a joint search on a CPU: a group goes through
the cache, and the more rows there are, the more seldom H is read."""

_WIDE = 512
"""Columns of a group from which on a loss under H costs much more than one under its diagonal."""


def search_scales(
    weight: Tensor,
    scheme: Scheme,
    group_size: int | None,
    scale_dtype: torch.dtype,
    importance: Tensor,
    grid: Grid = FINE,
) -> tuple[Tensor, Tensor | None]:
    """Choose the scales that minimise sum_j v_j e_j^2 of each group.

    Args:
        weight: float32 [O, I].
        importance: float32 [I], the weights v, or [O, I] where they differ between rows.

    Returns:
        scale in `scale_dtype`, shaped as `choose_absmax` does, and zero_point int8 [O, G], or None
        for symmetric schemes.

    Raises:
        ValueError: `group_size` does not divide I.
    """

    def search(rows: Tensor, here: Tensor) -> tuple[Tensor, Tensor | None]:
        grouped = group_weights(rows, scheme, group_size)
        weights = group_weights(here, scheme, group_size)

        def loss(error: Tensor) -> Tensor:
            return error.square_().mul_(weights).sum(2)

        absmax, zero_point = choose_group_absmax(grouped, scheme, scale_dtype)
        # In units of its absmax scale no group overflows or vanishes in the objective.
        unit = absmax.float()
        part = _Part(grouped / unit.unsqueeze(2), unit, None, absmax, scheme)
        if by_loops:
            return _take_cheapest(part, zero_point, weights, grid)
        return _improve(part, absmax, zero_point, loss, _candidates(part, grid))

    by_loops = chooses_cheapest(weight, scheme)
    in_blocks = scheme.granularity == "block"
    rows = _rows_at_once(weight, BLOCK_SIZE if in_blocks else 1)
    shared = importance.reshape(1, -1).expand(BLOCK_SIZE if in_blocks else 1, -1)
    return _join(
        [
            search(
                weight[start : start + rows],
                shared if importance.dim() == 1 else importance[start : start + rows],
            )
            for start in range(0, weight.shape[0], rows)
        ]
    )


@dataclass(frozen=True)
class JointSearch:
    """What a joint search found.

    scale: [O, G] in the stored dtype; zero_point: int8 [O, G] or None. losses: e H e^T of each
    row, float64 [O]; plain_losses: the same for absmax scales.
    """

    scale: Tensor
    zero_point: Tensor | None
    losses: Tensor
    plain_losses: Tensor


def search_scales_jointly(
    weight: Tensor,
    scheme: Scheme,
    group_size: int | None,
    scale_dtype: torch.dtype,
    second_moment: Tensor,
    sweeps: int,
    grid: Grid = FINE,
    channel_scale: Tensor | None = None,
    quick: bool = False,
) -> JointSearch:
    """Choose the scales that minimise e H e^T of each row, group by group, starting from absmax.

    No step raises the loss of a row, so none ends above that of absmax scales.

    Args:
        weight: float32 [O, I].
        second_moment: float32 [I, I].
        sweeps: how often to go over the groups.
        channel_scale: float32 [O, I], positive, or None. Where given, codes stand for
            `weight * channel_scale`, and e is the error after division by the channel scale.
        quick: whether what the errors of other groups cost may be summed from rounded factors
            (`quick_products`); within a group it never is.

    Raises:
        ValueError: `group_size` does not divide I, or scales are shared between rows.
    """
    if scheme.granularity == "block":
        raise ValueError(f"scheme {scheme.name}: rows that share their scales have no loss alone")
    groups = 1 if group_size is None else weight.shape[1] // group_size
    rows = _rows_at_once(weight, 64, min(_MOST_ELEMENTS, groups * _GROUP_ELEMENTS))
    parts = []
    for start in range(0, weight.shape[0], rows):
        here = slice(start, start + rows)
        channel = None if channel_scale is None else channel_scale[here]
        scaled = weight[here] if channel is None else weight[here] * channel
        grouped = group_weights(scaled, scheme, group_size)
        absmax, zero_point = choose_group_absmax(grouped, scheme, scale_dtype)
        unit = row_units(weight[here])
        shape = (*absmax.shape, -1)
        part = _Part(
            (weight[here] / unit).reshape(shape),
            unit,
            None if channel is None else channel.reshape(shape),
            absmax,
            scheme,
        )
        parts.append(_search_jointly(part, zero_point, second_moment, sweeps, grid, quick))
    scale, zero_point = _join([(part.scale, part.zero_point) for part in parts])
    return JointSearch(
        scale,
        zero_point,
        torch.cat([part.losses for part in parts]),
        torch.cat([part.plain_losses for part in parts]),
    )


def _rows_at_once(weight: Tensor, least: int, more: int = 0) -> int:
    """Return how many rows to treat at a time: few enough for a core's cache, many for a GPU.

    It is a multiple of `least`.

    Args:
        more: weights at a time on a CPU where not all of them go through the cache at once.
    """
    elements = max(1 << 19, more) if weight.device.type == "cpu" else 1 << 25
    return max(1, elements // (weight.shape[1] * least)) * least


def _join(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    zero_points = [zero_point for _, zero_point in parts if zero_point is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zero_points) if zero_points else None


@dataclass(frozen=True)
class _Part:
    """Rows to be searched.

    grouped: weights [R, G, g] divided by `unit`. unit: [R, G] or [R, 1]. channel: channel scales
    [R, G, g] or None. absmax: scales [R, G] in the stored dtype.
    """

    grouped: Tensor
    unit: Tensor
    channel: Tensor | None
    absmax: Tensor
    scheme: Scheme


def _search_jointly(
    part: _Part,
    zero_point: Tensor | None,
    second_moment: Tensor,
    sweeps: int,
    grid: Grid,
    quick: bool,
) -> JointSearch:
    """`search_scales_jointly` for a few rows; starts from absmax."""
    scale = part.absmax.clone()
    _, groups, size = part.grouped.shape
    error = _error(part, scale, zero_point)
    with quick_products(quick):
        residual = error.flatten(1) @ second_moment
    plain_losses = torch.sum(residual * error.flatten(1), dim=1, dtype=torch.float64)
    losses = plain_losses.clone()
    # What a group's errors changed by in its last turn, of which the groups after it have to learn.
    changes = torch.zeros_like(residual)
    # Without other groups a second sweep would find the same again.
    for turn in range(groups * (sweeps if groups > 1 else 1)):
        group = turn % groups
        at = slice(group, group + 1)
        columns = slice(group * size, (group + 1) * size)
        block = second_moment[columns, columns]
        changes[:, columns] = 0.0
        reach = slice(0, columns.start if turn < groups else groups * size)
        with quick_products(quick):
            residual[:, columns] += changes[:, reach] @ second_moment[reach, columns]
        old = error[:, group]
        linear = residual[:, columns] - old @ block

        def loss(error: Tensor, block: Tensor = block, linear: Tensor = linear) -> Tensor:
            flat = error[:, 0]
            return (flat @ block).add_(linear, alpha=2).mul_(flat).sum(1, keepdim=True)

        here = _Part(
            part.grouped[:, at],
            part.unit,
            None if part.channel is None else part.channel[:, at],
            part.absmax[:, at],
            part.scheme,
        )
        zero_here = None if zero_point is None else zero_point[:, at]
        if size > _WIDE:
            candidates = _shortlist(here, grid, block.diagonal())
        else:
            candidates = _candidates(here, grid)
        scale[:, at], zero_better = _improve(here, scale[:, at], zero_here, loss, candidates)
        if zero_point is not None and zero_better is not None:
            zero_point[:, at] = zero_better
        new = _error(here, scale[:, at], zero_better)[:, 0]
        change = new - old
        moved = change @ block
        losses += torch.add(moved, residual[:, columns], alpha=2).mul_(change).sum(dim=1)
        residual[:, columns] += moved
        changes[:, columns] = change
        error[:, group] = new
    square = part.unit.squeeze(1).double().square()
    return JointSearch(scale, zero_point, losses * square, plain_losses * square)


def _improve(
    part: _Part,
    scale: Tensor,
    zero_point: Tensor | None,
    loss: Callable[[Tensor], Tensor],
    candidates: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """Return the best of (scale, zero_point) and other candidates.

    Args:
        loss: errors [R, G, g] in units, which it may destroy -> losses [R, G].
        candidates: scales and zero points [C, R, G].
    """
    buffer = torch.empty_like(part.grouped)
    best = loss(_error(part, scale, zero_point, buffer))
    for candidate, shifted in _each(*candidates):
        cost = loss(_error(part, candidate, shifted, buffer))
        better = cost < best
        best = torch.where(better, cost, best)
        scale = torch.where(better, candidate, scale)
        if zero_point is not None and shifted is not None:
            zero_point = torch.where(better, shifted, zero_point)
    return scale, zero_point


def _take_cheapest(
    part: _Part, zero_point: Tensor | None, importance: Tensor, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """Do what `_improve` does from absmax scales, by loops that read the weights once."""
    scales, offsets = _candidates(part, grid)
    scales = torch.cat([part.absmax.unsqueeze(0), scales])
    if zero_point is not None and offsets is not None:
        offsets = torch.cat([zero_point.unsqueeze(0), offsets])
    best = cheapest_scales(part.grouped, part.unit, scales, offsets, importance, part.scheme)
    best = best.unsqueeze(0)
    chosen = None if offsets is None else offsets.gather(0, best).squeeze(0)
    return scales.gather(0, best).squeeze(0), chosen


def _candidates(part: _Part, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Return scales [C, R, G] and zero points of a grid around the absmax scale."""
    absmax = part.absmax.float()
    factors = absmax.new_tensor(grid.factors(part.scheme)).view(-1, 1, 1)
    scales = round_scale(absmax * factors, part.scheme, part.absmax.dtype)
    if part.scheme.symmetric:
        return scales, None
    smallest, largest = code_range(part.scheme.weight_bits)
    centred = torch.round((smallest + largest) / 2 - _centre(part) / scales.float())
    shifts = absmax.new_tensor(grid.shifts).view(-1, 1, 1)
    offsets = (centred.unsqueeze(1) + shifts).clamp_(smallest, largest).to(torch.int8)
    return scales.repeat_interleave(len(shifts), 0), offsets.flatten(0, 1)


def _shortlist(part: _Part, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the candidates with the lowest sums of v_j e_j^2, a quarter of all, each row its own.

    Args:
        importance: float32 [g], the weights v.
    """
    scales, offsets = _candidates(part, grid)
    buffer = torch.empty_like(part.grouped)
    costs = [
        _error(part, *each, buffer).square_().mul_(importance).sum(2)
        for each in _each(scales, offsets)
    ]
    best = torch.stack(costs).topk(max(1, len(scales) // 4), dim=0, largest=False).indices
    return scales.gather(0, best), None if offsets is None else offsets.gather(0, best)


def _each(scales: Tensor, offsets: Tensor | None) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Pair scales [C, R, G] with their zero points, if there are any."""
    return zip(scales, repeat(None) if offsets is None else offsets, strict=False)


def _centre(part: _Part) -> Tensor:
    """Return the middle of the range of each group, which includes zero, [R, G]."""
    scaled = part.grouped if part.channel is None else part.grouped * part.channel
    return (scaled.amin(2).clamp(max=0.0) + scaled.amax(2).clamp(min=0.0)) * part.unit / 2


def _error(
    part: _Part, scale: Tensor, zero_point: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Round the weights to nearest; return dequantized minus original [R, G, g], in units."""
    step = relative_steps(scale, part.unit).unsqueeze(2)
    if part.channel is not None:
        step = step / part.channel
    values = torch.div(part.grouped, step, out=out)
    offset = None if zero_point is None else zero_point.float().unsqueeze(2)
    return round_values(values, part.scheme, offset).mul_(step).sub_(part.grouped)
