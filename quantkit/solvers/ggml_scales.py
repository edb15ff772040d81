"""Scales and minimums of ggml's block types, searched by what rounding to nearest then costs.

The objective is sum_j v_j e_j^2 of each sub-block, where v_j is the curvature that is left of
column j once the columns rounded later make up for it (see `solvers/gptq.py`). In three steps:

1. For each sub-block the best real scale (and minimum): for each of several ranges the weights are
   rounded, and the scale that suits these codes best follows in closed form.
2. For each super-block the float16 by which these scales are to be integers: the one of several
   under which they come out best.
3. In turns: the integers of each sub-block take a neighbour's place where the weights, rounded
   anew, come out better there, and d (and dmin) are refitted to the codes.

Shapes: R rows, I columns, S sub-blocks of g columns, B blocks or super-blocks, n = S / B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.affine import relative_steps, round_values, row_units
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.solvers.ggml_halves import Quadratic, ratio, refit_halves, to_half
from quantkit.solvers.ggml_rows import join_rows, values_to_codes

_ROUNDS = 2
"""How often integers and their float16 are improved in turns."""

_COARSE_RANGES = tuple(0.60 + 0.03 * step for step in range(16))
_FINE_RANGES = tuple(0.84 + 0.02 * step for step in range(10))
"""Ranges of the codes relative to that of the weights, for up to four bits and for more. They are
bounded from below, since a scale that were free would collapse where the importance is
concentrated on a few columns."""

_TOPS = tuple(1.0 - 0.025 * step for step in range(13))
"""Where in the range of the integers the largest scale of a super-block is tried."""


@dataclass(frozen=True)
class _Part:
    """Rows that are searched, in units of the rows.

    weight: float32 [R, S, g]. importance: float32 [S, g]. unit: float32 [R, 1], powers of two.
    """

    weight: Tensor
    importance: Tensor
    unit: Tensor
    kind: GgmlType


def search_blocks(weight: Tensor, kind: GgmlType, importance: Tensor) -> GgmlBlocks:
    """Choose scales for float32 [R, I], and the codes nearest under them.

    Args:
        importance: float32 [I], the weights v, near 1.
    """
    at_once = 1 << 19 if weight.device.type == "cpu" else 1 << 25
    grouped = importance.reshape(-1, kind.sub_block)
    found = []
    for rows in weight.split(max(1, at_once // weight.shape[1])):
        unit = row_units(rows)
        part = _Part((rows / unit).unflatten(1, grouped.shape), grouped, unit, kind)
        found.append(_search_part(part))
    return join_rows(found)


def _search_part(part: _Part) -> GgmlBlocks:
    kind = part.kind
    scale, minimum = _fit_range(part) if kind.has_minimum else (_fit_scale(part), None)
    if kind.sub_scales is None:
        d = to_half(scale * part.unit)
        m = None if minimum is None else to_half(minimum * part.unit)
        draft = GgmlBlocks(kind, d.to(torch.int8), d, m)
    else:
        draft = _divide_scales(part, scale, minimum)
        for _ in range(_ROUNDS):
            draft = _refit_super_blocks(part, _move_integers(part, draft))
        draft = _move_integers(part, draft)
    codes = values_to_codes(_round(part, *_relative(part, draft)), kind)
    return replace(draft, codes=codes.flatten(1))


def _relative(part: _Part, draft: GgmlBlocks) -> tuple[Tensor, Tensor | None]:
    """Return the scales and minimums [R, S] of a draft in units of the rows."""
    minimums = draft.minimums()
    return draft.scales() / part.unit, None if minimums is None else minimums / part.unit


def _round(part: _Part, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """Return the nearest values float32 [R, S, g] under scales and minimums [R, S]."""
    steps = relative_steps(scale, torch.ones((), device=scale.device)).unsqueeze(2)
    if minimum is None:
        return round_values(part.weight / steps, part.kind, None)
    return round_values((part.weight - minimum.unsqueeze(2)).div_(steps), part.kind, None)


def _cost(part: _Part, values: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """Return sum_j v_j e_j^2 of each sub-block [R, S]."""
    error = torch.addcmul(part.weight, values, scale.unsqueeze(2), value=-1)
    if minimum is not None:
        error -= minimum.unsqueeze(2)
    return error.square_().mul_(part.importance).sum(2)


def _ranges(kind: GgmlType) -> tuple[float, ...]:
    low, high = kind.codes
    return _COARSE_RANGES if high - low < 16 else _FINE_RANGES


def _edges(kind: GgmlType) -> tuple[int, int]:
    """Return the smallest and largest value of a code."""
    return (kind.values[0], kind.values[-1]) if kind.values else kind.codes


def _fit_scale(part: _Part) -> Tensor:
    """Return the best scale of each sub-block [R, S]; its sign is that of the better direction."""
    weighted = part.weight * part.importance
    largest = part.weight.gather(2, part.weight.abs().argmax(2, keepdim=True))
    best_gain = torch.zeros_like(largest[:, :, 0])
    best = torch.zeros_like(best_gain)

    def try_scale(scale: Tensor) -> None:
        values = _round(part, scale, None)
        along = (weighted * values).sum(2)
        bend = values.square_().mul_(part.importance).sum(2)
        gain = ratio(along.square(), bend)
        better = gain > best_gain
        best_gain.copy_(torch.where(better, gain, best_gain))
        best.copy_(torch.where(better, ratio(along, bend), best))

    for factor in _ranges(part.kind):
        for edge in _edges(part.kind):
            try_scale(largest[:, :, 0] * (factor / edge))
    for _ in range(2):
        try_scale(best.clone())
    return best


def _fit_range(part: _Part) -> tuple[Tensor, Tensor]:
    """Return the best scale and minimum of each sub-block [R, S]; types with super-blocks only
    subtract."""
    kind = part.kind
    low, high = part.weight.amin(2), part.weight.amax(2)
    if kind.sub_minimums is not None:
        low.clamp_(max=0.0)
    sums = _Sums.of(part)
    best_cost = torch.full_like(low, torch.inf)
    best_scale, best_minimum = torch.zeros_like(low), low.clone()

    def try_range(scale: Tensor, minimum: Tensor) -> None:
        values = _round(part, scale, minimum)
        scale, minimum = sums.fit(values)
        cost = _cost(part, values, scale, minimum)
        better = cost < best_cost
        best_cost.copy_(torch.where(better, cost, best_cost))
        best_scale.copy_(torch.where(better, scale, best_scale))
        best_minimum.copy_(torch.where(better, minimum, best_minimum))

    for factor in _ranges(kind):
        scale = (high - low) * (factor / kind.codes[1])
        for lift in (0.0, 0.5, 1.0):
            try_range(scale, low + (high - low) * ((1.0 - factor) * lift))
    for _ in range(2):
        try_range(best_scale.clone(), best_minimum.clone())
    return best_scale, best_minimum


@dataclass(frozen=True)
class _Sums:
    """What the least squares of scale and minimum need of the weights.

    weighted: v w [R, S, g]. weight: its sum [R, S]; one: the sum of v [S].
    """

    importance: Tensor
    weighted: Tensor
    weight: Tensor
    one: Tensor
    subtracts: bool

    @staticmethod
    def of(part: _Part) -> _Sums:
        weighted = part.weight * part.importance
        return _Sums(
            part.importance,
            weighted,
            weighted.sum(2),
            part.importance.sum(1),
            part.kind.sub_minimums is not None,
        )

    def fit(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales and minimums [R, S] that suit values [R, S, g] best."""
        scaled = values * self.importance
        first, second = scaled.sum(2), scaled.mul_(values).sum(2)
        along = (self.weighted * values).sum(2)
        determinant = self.one * second - first.square()
        # Values that are all alike leave the scale open.
        open_ = determinant <= 1e-6 * self.one * second
        scale = (self.one * along - self.weight * first) / determinant
        minimum = (second * self.weight - first * along) / determinant
        scale = torch.where(open_, torch.zeros_like(scale), scale)
        minimum = torch.where(open_, self.weight / self.one, minimum)
        if self.subtracts:
            above = minimum > 0
            minimum = minimum.clamp(max=0.0)
            scale = torch.where(above, ratio(along, second), scale)
            # Neither of the integers has a sign.
            scale = scale.clamp(min=0.0)
        return scale, minimum


def _divide_scales(part: _Part, scale: Tensor, minimum: Tensor | None) -> GgmlBlocks:
    """Make integers of the scales and minimums of each super-block."""
    kind = part.kind
    assert kind.sub_scales is not None
    values = _round(part, scale, minimum)
    scaled = values * part.importance
    first, second = scaled.sum(2), scaled.mul_(values).sum(2)
    d, sub_scales = _divide(part, scale, second, kind.sub_scales)
    if minimum is None or kind.sub_minimums is None:
        return GgmlBlocks(kind, sub_scales, d, None, sub_scales)
    rounded = GgmlBlocks(kind, sub_scales, d, None, sub_scales).scales() / part.unit
    one = part.importance.sum(1)
    # What the scale gained or lost by rounding, the minimum makes up for.
    aim = (minimum + (scale - rounded) * first / one).clamp(max=0.0)
    m, sub_minimums = _divide(part, -aim, one.expand_as(aim), kind.sub_minimums)
    return GgmlBlocks(kind, sub_scales, d, m, sub_scales, sub_minimums)


def _divide(
    part: _Part, factors: Tensor, weights: Tensor, bounds: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return float16 [R, B] and int8 [R, S] whose products are near to factors [R, S].

    Args:
        weights: [R, S], of the squared differences. bounds: of the integers.
    """
    grouped = factors.unflatten(1, (factors.shape[1] * part.kind.sub_block // part.kind.block, -1))
    weights = weights.reshape(grouped.shape)
    unit = part.unit.unsqueeze(2)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    best_cost = torch.full_like(largest, torch.inf)
    best_d = torch.zeros_like(largest, dtype=torch.float16)
    best = torch.zeros_like(grouped)
    edges = bounds if bounds[0] else bounds[1:]
    for edge in edges:
        for top in _TOPS:
            d = to_half(largest * unit / round(edge * top))
            step = relative_steps(d, unit)
            integers = (grouped / step).round_().clamp_(*bounds)
            error = torch.addcmul(grouped, integers, d.float() / unit, value=-1)
            cost = error.square_().mul_(weights).sum(2, keepdim=True)
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            best_d = torch.where(better, d, best_d)
            best = torch.where(better, integers, best)
    return best_d.squeeze(2), best.flatten(1).to(torch.int8)


def _move_integers(part: _Part, draft: GgmlBlocks) -> GgmlBlocks:
    """Move the integers of each sub-block by up to one where its weights come out better."""
    best_cost = None
    best = draft
    for change, shift in ((c, s) for c in (0, 1, -1) for s in (0, 1, -1)):
        if shift and draft.sub_minimums is None:
            continue
        moved = replace(
            draft,
            sub_scales=_move(draft.sub_scales, change, part.kind.sub_scales),
            sub_minimums=_move(draft.sub_minimums, shift, part.kind.sub_minimums),
        )
        scale, minimum = _relative(part, moved)
        cost = _cost(part, _round(part, scale, minimum), scale, minimum)
        if best_cost is None:
            best_cost = cost
            continue
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best = replace(
            best,
            sub_scales=_choose(better, moved.sub_scales, best.sub_scales),
            sub_minimums=_choose(better, moved.sub_minimums, best.sub_minimums),
        )
    return best


def _move(integers: Tensor | None, by: int, bounds: tuple[int, int] | None) -> Tensor | None:
    if integers is None or bounds is None:
        return None
    return integers.short().add_(by).clamp_(*bounds).to(torch.int8)


def _choose(where: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.where(where, one, other)


def _refit_super_blocks(part: _Part, draft: GgmlBlocks) -> GgmlBlocks:
    """Refit d and dmin of each super-block to its codes, where that lowers the cost."""
    assert draft.sub_scales is not None
    per_block = (draft.d.shape[1], -1)
    scale, minimum = _relative(part, draft)
    values = _round(part, scale, minimum)
    along = values * draft.sub_scales.float().unsqueeze(2)
    weights = part.importance
    error = torch.addcmul(part.weight, values, scale.unsqueeze(2), value=-1)
    if minimum is not None:
        error -= minimum.unsqueeze(2)
    error *= weights

    def per(sums: Tensor) -> Tensor:
        return sums.sum(2).unflatten(1, per_block).sum(2)

    slope, bend = per(error * along), per(along.square() * weights)
    none = torch.zeros_like(slope)
    quadratic = Quadratic(slope, bend, none, none, none)
    if draft.sub_minimums is not None:
        lift = -draft.sub_minimums.float().unsqueeze(2).expand_as(along)
        quadratic = Quadratic(
            slope,
            bend,
            slope_minimum=per(error * lift),
            cross=per(along * lift * weights),
            bend_minimum=per(lift.square() * weights),
        )
    d, m = refit_halves(draft.d, draft.m, quadratic, part.unit)
    return replace(draft, d=d, m=m)
