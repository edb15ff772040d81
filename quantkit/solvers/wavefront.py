"""Round rows that make up for each other, many at a time.

The loss is tr(F E H E^T) for errors E [B, I] of rows that F couples and columns that H couples.
Nearest-plane rounding takes the entries of a matrix one after the other, and each one must know
the errors of the rows and columns before it. Where rows come from the first and columns from the
last, the entries of a diagonal need nothing of each other: they are rounded at once, and B + I - 1
steps do what B * I would. Coordinate descent goes the same way. There the entries of a diagonal do
move each other a little, so a sweep that does not lower the loss is undone.

Shapes: P panels of rows that are independent of each other, B rows of a panel, I input features,
G groups along I, b rows of a batch, n entries of a diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.affine import CodeSet, relative_steps, round_scale, round_values
from quantkit.numerics.linalg import Factor
from quantkit.schemes import Scheme

_ROWS = 64
"""Rows of a batch: the rows before it and behind it are accounted for by a matmul."""

_LARGEST_RATIO = 1e30
"""Bound of what one row is told of another, in their units, so that no sum overflows."""


@dataclass(frozen=True)
class Panels:
    """Rows that are being rounded, in the order in which that is done; they change in place.

    weight: float32 [P, B, I], in units of the rows. values: float32 [P, B, I], codes less zero
    points. scale: [P, B, G] in the stored dtype, or of any sign for a ggml type; zero_point:
    float32 [P, B, G] or None.
    unit: float32 [P, B], powers of two. fisher: float32 [P, B, B], positive definite.
    """

    weight: Tensor
    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    unit: Tensor
    fisher: Tensor
    scheme: CodeSet

    def steps(self) -> Tensor:
        """Return the scales float32 [P, B, G] in units of the rows."""
        return relative_steps(self.scale, self.unit.unsqueeze(2))

    def error(self) -> Tensor:
        """Return the errors float32 [P, B, I] in units of the rows."""
        return self.weight - self.values * widen(self.steps(), self.weight.shape[2])

    def losses(self, second_moment: Tensor) -> Tensor:
        """Return tr(F E H E^T) of each panel, in units of its largest row; float64 [P]."""
        largest = self.unit.amax(dim=1, keepdim=True)
        error = self.error() * (self.unit / largest).unsqueeze(2)
        product = (self.fisher @ error).mul_(error @ second_moment)
        return torch.sum(product, dim=(1, 2), dtype=torch.float64)

    def ratios(self, matrix: Tensor) -> Tensor:
        """Bring a matrix [P, B, B], from errors to weights, to the units of both rows."""
        scaled = matrix * (self.unit.unsqueeze(1) / self.unit.unsqueeze(2))
        return scaled.nan_to_num_().clamp_(-_LARGEST_RATIO, _LARGEST_RATIO)


def compensate_panels(panels: Panels, factor: Factor) -> None:
    """Choose the values by nearest-plane rounding, the scales being fixed.

    Args:
        factor: of the second moment.
    """
    order, size = factor.order, len(factor.order)
    weight = panels.weight[:, :, order]
    steps = widen(panels.steps(), size)[:, :, order]
    offsets = None
    if panels.zero_point is not None:
        offsets = widen(panels.zero_point, size)[:, :, order]
    columns = (factor.lower / factor.lower.diagonal()).float()
    rows = panels.ratios(_row_feedback(panels.fisher))
    # What a row makes up for others is never larger than its own weights: codes could not follow.
    bound = weight.abs().amax(dim=2)
    error, values = torch.zeros_like(weight), torch.empty_like(weight)
    for batch in _batches(weight.shape[1]):
        most = bound[:, batch].unsqueeze(2)
        shift = rows[:, batch, : batch.start] @ error[:, : batch.start]
        error[:, batch], values[:, batch] = _round_batch(
            weight[:, batch],
            torch.minimum(torch.maximum(shift, -most), most),
            steps[:, batch],
            None if offsets is None else offsets[:, batch],
            rows[:, batch, batch],
            columns,
            bound[:, batch],
            panels.scheme,
        )
    panels.values[:, :, order] = values


def _row_feedback(fisher: Tensor) -> Tensor:
    """Return the strictly lower [P, B, B] whose row r tells how r makes up for the rows before.

    With F = U U^T for upper U the loss is that of U^T E, whose row r has the errors of the rows up
    to r: sum_k U_kr E_k, so row r makes up for sum_{k<r} U_kr E_k / U_rr.
    """
    upper = torch.linalg.cholesky(fisher.double().flip(1, 2)).flip(1, 2)
    unit = upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(1)
    return unit.mT.tril(-1).float()


def _round_batch(
    weight: Tensor,
    shift: Tensor,
    steps: Tensor,
    offsets: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    bound: Tensor,
    scheme: CodeSet,
) -> tuple[Tensor, Tensor]:
    """Round b rows, diagonal by diagonal; return errors and values [P, b, I].

    Args:
        weight, steps, offsets: [P, b, I], columns in the order of the factor.
        shift: [P, b, I], what makes up for the rows before the batch.
        rows: strictly lower [P, b, b]; columns: unit lower [I, I].
        bound: [P, b], of what makes up for rows of the batch.
    """
    aim = weight + shift
    target = aim.clone()
    error, values = torch.zeros_like(weight), torch.empty_like(weight)
    for row, column in _diagonals(weight.shape[1], weight.shape[2]):
        seen = error[:, : row.stop, column]
        own_shift = (rows[:, row, : row.stop].mT * seen).sum(dim=1)
        most = bound[:, row]
        own_shift = torch.minimum(torch.maximum(own_shift, -most), most)
        step = _pick(steps, row, column)
        value = (_pick(target, row, column) + own_shift).div_(step)
        round_values(value, scheme, None if offsets is None else _pick(offsets, row, column))
        decoded = value * step
        _pick(values, row, column).copy_(value)
        torch.sub(_pick(weight, row, column), decoded, out=_pick(error, row, column))
        own_shift.add_(_pick(aim, row, column)).sub_(decoded)
        before = slice(0, column.stop)
        target[:, row, before].addcmul_(own_shift.unsqueeze(2), columns[column, before])
    return error, values


def polish_panels(panels: Panels, second_moment: Tensor, ridge: float, sweeps: int) -> None:
    """Lower the loss by coordinate descent on values and scales, in `sweeps` passes; on values
    alone for ggml types, whose scales are integers of a super-block.

    The best change of one value is R_rj / (F_rr H_jj) steps, with R = F E H, and that of the scale
    of a group k with the values V is (R_rk V^T) / (F_rr V H_kk V^T).

    Args:
        second_moment: float32 [I, I].
        ridge: fraction of mean(diag H) that is added to the diagonal.
    """
    moment = second_moment.clone()
    moment.diagonal().add_(ridge * second_moment.diagonal().mean())
    diagonal = panels.fisher.diagonal(dim1=1, dim2=2)
    rows = panels.ratios(panels.fisher / diagonal.unsqueeze(2))
    losses = panels.losses(moment)
    for _ in range(sweeps):
        values, scale = panels.values.clone(), panels.scale.clone()
        residual = panels.error() @ moment
        for batch in _batches(panels.weight.shape[1]):
            _polish_batch(panels, batch, rows[:, batch], residual, moment)
        new = panels.losses(moment)
        # Written so that a loss that is not a number counts as worse.
        worse = ~(new < losses)
        panels.values[worse], panels.scale[worse] = values[worse], scale[worse]
        losses = torch.where(worse, losses, new)
        if bool(worse.all()):
            return


def _polish_batch(
    panels: Panels, batch: slice, rows: Tensor, residual: Tensor, moment: Tensor
) -> None:
    """Move the values and scales of b rows to better ones; `residual` [P, B, I], E H, follows.

    Args:
        rows: [P, b, B], F_rk / F_rr in the units of both rows.
    """
    size = moment.shape[0]
    own = rows[:, :, batch]
    here = residual[:, batch].clone()
    others = (rows @ residual).sub_(own @ here)
    steps = widen(panels.steps()[:, batch], size)
    offsets = None
    if panels.zero_point is not None:
        offsets = widen(panels.zero_point[:, batch], size)
    values = panels.values[:, batch].clone()
    curvature = moment.diagonal() * steps
    # A column that was never active has no best value: its codes stay.
    gain = torch.where(curvature > 0, 1.0 / curvature, torch.zeros_like(curvature))
    for row, column in _diagonals(values.shape[1], size):
        slope = (own[:, row].mT * here[:, :, column]).sum(dim=1).add_(_pick(others, row, column))
        old = _pick(values, row, column)
        new = slope.mul_(_pick(gain, row, column)).add_(old).nan_to_num_()
        offset = None if offsets is None else _pick(offsets, row, column)
        round_values(new, panels.scheme, offset)
        change = (old - new).mul_(_pick(steps, row, column))
        old.copy_(new)
        here[:, row].addcmul_(change.unsqueeze(2), moment[column])
    panels.values[:, batch] = values
    if isinstance(panels.scheme, Scheme):
        _refit_batch(panels, panels.scheme, batch, own, others, here, moment)
    residual[:, batch] = here


def _refit_batch(
    panels: Panels,
    scheme: Scheme,
    batch: slice,
    own: Tensor,
    others: Tensor,
    residual: Tensor,
    moment: Tensor,
) -> None:
    """Refit the scales of b rows, one row after the other, group by group.

    Args:
        own: [P, b, b], F_rk / F_rr within the batch. others: [P, b, I], the part of R / F_rr that
            is due to rows outside of it. residual: [P, b, I], follows.
    """
    groups = panels.scale.shape[2]
    width = moment.shape[0] // groups
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        values = panels.values[:, batch, part]
        moved = values @ moment[part]
        curvature = (moved[:, :, part] * values).sum(dim=2)
        fixed = (others[:, :, part] * values).sum(dim=2)
        for row in range(values.shape[1]):
            scale, unit = (
                panels.scale[:, batch.start + row, group],
                panels.unit[:, batch.start + row],
            )
            coupled = own[:, row].unsqueeze(1) @ residual[:, :, part]
            slope = (coupled.squeeze(1) * values[:, row]).sum(dim=1).add_(fixed[:, row])
            bend, old = curvature[:, row], scale.float() / unit
            candidate = round_scale((old + slope / bend) * unit, scheme, scale.dtype)
            change = candidate.float() / unit - old
            # False, too, for a group without values, whose curvature is zero.
            better = change * (2 * slope - change * bend) > 0
            change = torch.where(better, change, torch.zeros_like(change))
            panels.scale[:, batch.start + row, group] = torch.where(better, candidate, scale)
            residual[:, row].addcmul_(change.unsqueeze(1), moved[:, row], value=-1)


def widen(matrix: Tensor, size: int) -> Tensor:
    """Repeat [P, b, G] along its groups, to [P, b, size]."""
    return matrix.repeat_interleave(size // matrix.shape[2], dim=2)


def _batches(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, min(count, start + _ROWS))


def _diagonals(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield the diagonals of a matrix: entry [first + k, low + k] for each k, bottom left last.

    The first diagonal is the top right corner alone. Rows come from the first to the last, and
    within each row columns from the last to the first.
    """
    for number in range(height + width - 1):
        first, stop = max(0, number - width + 1), min(height, number + 1)
        low = width - 1 - number + first
        yield slice(first, stop), slice(low, low + stop - first)


def _pick(matrix: Tensor, row: slice, column: slice) -> Tensor:
    """Return a view [P, n] of a diagonal of [P, b, I]."""
    return matrix[:, row, column].diagonal(dim1=1, dim2=2)
