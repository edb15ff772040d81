"""Nearest-plane rounding that follows several roundings of a row at a time.

What rounding a column costs is known as soon as it is rounded, L_jj^2 (e_j)^2 (see
`solvers/gptq.py`), so roundings can be compared before they are complete. This is the K-best
decoder of multi-antenna receivers (Guo and Nilsson, IEEE JSAC 24(3), 2006) with one change: at each
column every rounding goes on with its nearest code, and one in a row, the cheapest that takes the
second nearest instead, replaces the dearest. It costs less than sorting all, and the roundings stay
more different from each other.

Shapes: B columns of the weight, R of its rows, K roundings of each row; they lie side by side, the
first of every row, then the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.affine import CodeSet, round_second, round_values

_PANEL = 32
"""Columns within which compensation follows at once; others of the block wait for a matmul."""

_FARTHEST = 1e9
_LARGEST_WEIGHT = 1e18
"""Bounds of steps to a target and of the cost of one, between which no cost overflows."""

_ELEMENTS_AT_ONCE = {"cpu": 1 << 13, "cuda": 1 << 19}
"""Roundings of rows at a time: few enough for a core's cache, enough to fill a GPU."""


@dataclass(frozen=True)
class _Roundings:
    """Roundings that are being followed; the tensors change in place.

    targets: [B, K * R]: weights plus what makes up for columns already rounded and, of those, codes
    less zero points. costs: [K * R]; infinite for those that do not exist yet.
    """

    targets: Tensor
    costs: Tensor
    width: int


def round_block_widely(
    block: Tensor,
    target: Tensor,
    lower: Tensor,
    pivots: Tensor,
    steps: Tensor,
    offsets: Tensor | None,
    scheme: CodeSet,
    width: int,
) -> None:
    """Round the columns of one block from the last to the first; `target` becomes the best values.

    Args:
        block: original weights [B, O] in row units.
        target: the weights plus what makes up for the columns already rounded; becomes codes less
            zero points.
        lower: unit lower triangle [B, B]; pivots: [B], what a squared error of each column costs.
        steps: scales [B, O] in row units; offsets: zero points [B, O] or None.
        width: K.
    """
    rows = max(1, _ELEMENTS_AT_ONCE[target.device.type] // width)
    for start in range(0, target.shape[1], rows):
        part = slice(start, start + rows)
        target[:, part] = _round_rows(
            block[:, part],
            target[:, part],
            lower,
            pivots,
            steps[:, part],
            None if offsets is None else offsets[:, part],
            scheme,
            width,
        )


def _round_rows(
    block: Tensor,
    target: Tensor,
    lower: Tensor,
    pivots: Tensor,
    steps: Tensor,
    offsets: Tensor | None,
    scheme: CodeSet,
    width: int,
) -> Tensor:
    """Return the best values [B, R] for a few rows."""
    block, steps = block.repeat(1, width), steps.repeat(1, width)
    offsets = None if offsets is None else offsets.repeat(1, width)
    rows = target.shape[1]
    costs = torch.full((width * rows,), torch.inf, device=target.device)
    costs[:rows] = 0.0
    found = _Roundings(target.repeat(1, width), costs, width)
    for stop in range(len(block), 0, -_PANEL):
        start = max(0, stop - _PANEL)
        panel = slice(start, stop)
        # Only differences count, and those are small beside what a clipped code once cost.
        by_row = costs.reshape(width, rows)
        by_row -= by_row.amin(dim=0)
        ancestors = _round_panel(
            found,
            panel,
            block[panel],
            lower[panel, panel],
            pivots[panel],
            steps[panel],
            None if offsets is None else offsets[panel],
            scheme,
        )
        errors = torch.addcmul(block[panel], found.targets[panel], steps[panel], value=-1)
        later, done = found.targets[:start], found.targets[stop:]
        moved = later.index_select(1, ancestors)
        torch.addmm(moved, lower[panel, :start].T, errors, out=later)
        done.copy_(done.index_select(1, ancestors))
    best = costs.reshape(width, rows).argmin(dim=0, keepdim=True)
    values = found.targets.reshape(-1, width, rows)
    return values.gather(1, best.expand(len(values), 1, rows)).squeeze(1)


def _round_panel(
    found: _Roundings,
    panel: slice,
    block: Tensor,
    lower: Tensor,
    pivots: Tensor,
    steps: Tensor,
    offsets: Tensor | None,
    scheme: CodeSet,
) -> Tensor:
    """Round the columns of a panel; return which rounding before it each one goes on from."""
    targets, costs, width = found.targets[panel], found.costs, found.width
    rows = len(costs) // width
    ancestors = torch.arange(len(costs), device=costs.device)
    # The step of an all-zero group can be huge or tiny beside the row.
    weights = (pivots.unsqueeze(1) * steps * steps).clamp_(max=_LARGEST_WEIGHT)
    error = torch.empty_like(costs)
    for column in range(len(targets) - 1, -1, -1):
        step, weight = steps[column], weights[column]
        offset = None if offsets is None else offsets[column]
        exact = targets[column].div_(step).clamp_(-_FARTHEST, _FARTHEST)
        nearest = round_values(exact.clone(), scheme, offset)
        second = round_second(exact, nearest, scheme, offset)
        rest, move = exact.sub_(nearest), second - nearest
        costs.addcmul_(weight, rest * rest)
        # (rest - move)^2 - rest^2; a rounding that does not move is no other rounding.
        more = torch.addcmul(move * move, rest, move, value=-2).mul_(weight).add_(costs)
        more.masked_fill_(move == 0, torch.inf)
        cheapest, parent = more.reshape(width, rows).min(dim=0)
        dearest, place = costs.reshape(width, rows).max(dim=0)
        row = torch.nonzero(cheapest < dearest).squeeze(1)
        source, goal = parent[row] * rows + row, place[row] * rows + row
        targets.index_copy_(1, goal, targets.index_select(1, source))
        ancestors.index_copy_(0, goal, ancestors.index_select(0, source))
        nearest.index_copy_(0, goal, second.index_select(0, source))
        costs.index_copy_(0, goal, cheapest.index_select(0, row))
        targets[column] = nearest
        torch.addcmul(block[column], nearest, step, value=-1, out=error)
        if column:
            targets[:column].addr_(lower[column, :column], error)
    return ancestors
