"""A search for the scales (and zero points) of groups by e H e^T of the whole row.

It is for rounding to nearest, and goes from group to group with the errors of all other groups
taken into account. Where columns make up for each other's errors, see `scale_search`.

Shapes: O output features, I input features, G groups of g columns, R rows treated at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.affine import (
    choose_group_absmax,
    group_columns,
    group_weights,
    row_units,
)
from quantkit.numerics.joint_cheapest import cheapest_jointly, chooses_jointly
from quantkit.numerics.precision import quick_products
from quantkit.numerics.scale_candidates import (
    FINE,
    Candidates,
    Choice,
    Grid,
    Part,
    choose,
    list_candidates,
    rounding_error,
    shorten,
)
from quantkit.numerics.scale_search import join_rows, rows_at_once
from quantkit.schemes import Scheme

_GROUP_ELEMENTS = 1 << 16
_MOST_ELEMENTS = 1 << 22
"""Weights of a group, and of all groups, at a time of a search on a CPU: a group goes through the
cache, unless compiled loops see to that, and the more rows there are, the more seldom H is read."""

_WIDE = 512
"""Columns of a group from which on a loss under H costs much more than one under its diagonal."""


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
        second_moment: float32 [I, I], symmetric.
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
    columns = weight.shape[1]
    size = group_columns(columns, group_size)
    by_loops = chooses_jointly(weight, scheme, size)
    elements = _MOST_ELEMENTS if by_loops else columns // size * _GROUP_ELEMENTS
    rows = rows_at_once(weight, 64, min(_MOST_ELEMENTS, elements))
    parts = []
    for start in range(0, weight.shape[0], rows):
        here = slice(start, start + rows)
        channel = None if channel_scale is None else channel_scale[here]
        scaled = weight[here] if channel is None else weight[here] * channel
        grouped = group_weights(scaled, scheme, group_size)
        absmax, zero_point = choose_group_absmax(grouped, scheme, scale_dtype)
        unit = row_units(weight[here])
        shape = (*absmax.shape, -1)
        part = Part(
            (weight[here] / unit).reshape(shape),
            unit,
            None if channel is None else channel.reshape(shape).contiguous(),
            absmax,
            scheme,
        )
        parts.append(_search(part, zero_point, second_moment, sweeps, grid, quick, by_loops))
    scale, zero_point = join_rows([(part.scale, part.zero_point) for part in parts])
    return JointSearch(
        scale,
        zero_point,
        torch.cat([part.losses for part in parts]),
        torch.cat([part.plain_losses for part in parts]),
    )


def _search(
    part: Part,
    zero_point: Tensor | None,
    second_moment: Tensor,
    sweeps: int,
    grid: Grid,
    quick: bool,
    by_loops: bool,
) -> JointSearch:
    """`search_scales_jointly` for a few rows."""
    scale = part.absmax.clone()
    _, groups, size = part.grouped.shape
    errors = rounding_error(part, scale, zero_point)
    flat = errors.flatten(1)
    plain_losses = flat.new_zeros(len(flat), dtype=torch.float64)
    gains = torch.zeros_like(plain_losses)
    # Without other groups a second sweep would find the same again.
    for turn in range(groups * (sweeps if groups > 1 else 1)):
        group = turn % groups
        at, columns = slice(group, group + 1), slice(group * size, (group + 1) * size)
        before, after = slice(0, columns.start), slice(columns.stop, groups * size)
        with quick_products(quick):
            linear = flat[:, before] @ second_moment[before, columns]
            # In the first sweep these groups are done, and the others still as absmax has them.
            done = (linear * flat[:, columns]).sum(1) if turn < groups else None
            linear += flat[:, after] @ second_moment[after, columns]
        here = part.take_group(group)
        offset = None if zero_point is None else zero_point[:, at]
        candidates = list_candidates(here, scale[:, at], offset, grid)
        block = second_moment[columns, columns]
        if size > _WIDE:
            candidates = shorten(here, candidates, block.diagonal())
        if by_loops:
            choice = cheapest_jointly(part, group, candidates, block, linear, flat)
        else:
            choice = _choose(here, candidates, block, linear)
        scale[:, at], better_offset = candidates.take(choice.chosen)
        if zero_point is not None and better_offset is not None:
            zero_point[:, at] = better_offset
        if not by_loops:
            errors[:, at] = rounding_error(here, scale[:, at], better_offset)
        if done is not None:
            plain_losses += choice.first[:, 0] - 2 * done
        gains += choice.best[:, 0] - choice.first[:, 0]
    square = part.unit.squeeze(1).double().square()
    return JointSearch(scale, zero_point, (plain_losses + gains) * square, plain_losses * square)


def _choose(part: Part, candidates: Candidates, block: Tensor, linear: Tensor) -> Choice:
    """Choose the scales of a group [R, 1] by e H e^T + 2 e l.

    Args:
        block: H of the group, float32 [g, g]. linear: l, what the errors of other groups make of
            it, float32 [R, g].
    """

    def loss(error: Tensor) -> Tensor:
        flat = error[:, 0]
        return (flat @ block).add_(linear, alpha=2).mul_(flat).sum(1, keepdim=True)

    return choose(part, candidates, loss)
