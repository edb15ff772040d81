"""Polish a finished rounding: coordinate descent on its codes, closed-form refit of its scales.

No step raises tr(E H E^T), where E = W - dequantized and H includes the ridge, if any. With
R = E H at hand, the best weight in place of one code is R_j / H_jj away, and the loss grows with
the square of the distance from it, so the nearest code is the best one, on even grids and uneven
ones (coordinate descent, arXiv 2309.01885). The best change of a scale whose group k has the
values V = codes - zero_point is (R_k V^T) / (V H_kk V^T) (arXiv 2602.02126), both summed over the
rows that share the scale. Columns are treated in blocks: inside a block R follows every change,
elsewhere one matmul a block does. Scales of groups that fit into a block are refitted with it, all
others once a sweep.

Memory beyond weight and H, with W for the bytes of the weight in float32: R 1 W, the errors that
it starts from 1 W, the codes 1/4 W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.affine import (
    CodeSet,
    decode,
    relative_steps,
    round_scale,
    round_values,
    row_units,
)
from quantkit.numerics.fp8 import spread_rows
from quantkit.schemes import BLOCK_SIZE, Scheme

_BLOCK = BLOCK_SIZE
_FINITE = (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
_ELEMENTS_AT_ONCE = 1 << 22
"""Of a temporary while scales of whole rows are refitted: 16 MiB of float32."""


@dataclass(frozen=True)
class _Draft:
    """A rounding that is being polished, by column of the weight; its tensors change in place.

    codes: [I, O]; scale: [G, O] in the stored dtype; zero_point: float32 [G, O] or None.
    columns: that share a scale. unit: [O], powers of two by which weights and steps are divided.
    residual: R float32 [I, O], in units. added: to the diagonal of the second moment.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    columns: int
    unit: Tensor
    residual: Tensor
    added: Tensor


def polish(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
    second_moment: Tensor,
    ridge: float,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower the output error of a rounding in `sweeps` passes over its columns.

    Args:
        weight: float32 [O, I].
        codes: [O, I]; scale: as the scheme shapes it; zero_point: int8 [O, G] or None.
        second_moment: float32 [I, I].
        ridge: fraction of mean(diag H) that is added to the diagonal.

    Returns:
        The new codes and scales in the dtypes and shapes of the old, and the loss e H e^T of each
        row without the ridge, float64 [O].
    """
    size = len(second_moment)
    added = ridge * second_moment.diagonal().mean()
    unit = row_units(weight, scheme).T
    error = decode(codes, scale, zero_point, scheme).sub_(weight).neg_().T.div_(unit)
    residual = torch.addcmul(second_moment @ error, error, added)
    del error
    in_blocks = scheme.granularity == "block"
    row_scale = spread_rows(scale, len(weight)) if in_blocks else scale
    # Copies even of a single row, whose transpose is contiguous already.
    draft = _Draft(
        codes=codes.T.clone(memory_format=torch.contiguous_format),
        scale=row_scale.T.clone(memory_format=torch.contiguous_format),
        zero_point=None if zero_point is None else zero_point.T.float(),
        scheme=scheme,
        columns=BLOCK_SIZE if in_blocks else size // scale.shape[1],
        unit=unit[0],
        residual=residual,
        added=added,
    )
    for _ in range(sweeps):
        for start in range(0, size, _BLOCK):
            _polish_block(draft, second_moment, start, min(size, start + _BLOCK))
        if _BLOCK % draft.columns:
            _refit_wide_groups(draft, second_moment)
    codes, row_scale = draft.codes.T.contiguous(), draft.scale.T
    scale = (row_scale[::BLOCK_SIZE] if in_blocks else row_scale).contiguous()
    error = decode(codes, scale, zero_point, scheme).sub_(weight).neg_().T.div_(unit)
    losses = torch.sum(residual.mul_(error), dim=0, dtype=torch.float64)
    losses -= added * torch.sum(error.square_(), dim=0, dtype=torch.float64)
    return codes, scale, losses * unit[0].double().square()


def _polish_block(draft: _Draft, second_moment: Tensor, start: int, stop: int) -> None:
    """Improve the codes of a few columns, and their scales where no others share them."""
    inner = second_moment[start:stop, start:stop].clone()
    inner.diagonal().add_(draft.added)
    groups = torch.arange(start, stop, device=inner.device) // draft.columns
    steps = relative_steps(draft.scale.index_select(0, groups), draft.unit)
    offset = None if draft.zero_point is None else draft.zero_point.index_select(0, groups)
    values = draft.codes[start:stop].float()
    if offset is not None:
        values -= offset
    here = draft.residual[start:stop]
    before = values * steps
    descend(values, steps, offset, here, inner, draft.scheme)
    draft.codes[start:stop] = values if offset is None else values + offset
    if _BLOCK % draft.columns == 0:
        every = slice(None)
        for first in range(0, stop - start, draft.columns):
            part = slice(first, first + draft.columns)
            group = (start + first) // draft.columns
            moved = inner[:, part] @ values[part]
            change = _refit(draft, group, every, values[part], here[part], moved[part])
            here.addcmul_(moved, change, value=-1)
        steps = relative_steps(draft.scale.index_select(0, groups), draft.unit)
    change = before.sub_(values.mul_(steps))
    draft.residual[:start].addmm_(second_moment[:start, start:stop], change)
    draft.residual[stop:].addmm_(second_moment[stop:, start:stop], change)


def descend(
    values: Tensor,
    steps: Tensor,
    offset: Tensor | None,
    residual: Tensor,
    inner: Tensor,
    scheme: CodeSet,
) -> None:
    """Move each value of a block [B, O] to its best one, column after column, in place.

    Args:
        steps: float32 [B, O], not zero; offset: zero points [B, O] or None.
        residual: R float32 [B, O], follows. inner: the block of H, [B, B].
    """
    diagonal = inner.diagonal().unsqueeze(1)
    # A column that was never active has no best value: its codes stay.
    gain = torch.where(diagonal > 0, 1.0 / (diagonal * steps), torch.zeros_like(steps))
    # Finite also where a step is tiny beside its row, so that nothing times it is nothing.
    gain.clamp_(*_FINITE)
    new = torch.empty_like(values[0])
    for column in range(len(values)):
        value = values[column]
        torch.addcmul(value, residual[column], gain[column], out=new)
        round_values(new, scheme, None if offset is None else offset[column])
        change = value.sub_(new).mul_(steps[column])
        residual.addr_(inner[column], change)
        value.copy_(new)


def _refit_wide_groups(draft: _Draft, second_moment: Tensor) -> None:
    """Refit the scales of groups that are wider than a block, or lie across two of them."""
    size, rows = draft.codes.shape
    at_once = max(1, _ELEMENTS_AT_ONCE // size)
    for group in range(len(draft.scale)):
        columns = slice(group * draft.columns, (group + 1) * draft.columns)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            values = draft.codes[columns, part].float()
            if draft.zero_point is not None:
                values -= draft.zero_point[group, part]
            moved = second_moment[:, columns] @ values
            moved[columns] += draft.added * values
            residual = draft.residual[:, part]
            change = _refit(draft, group, part, values, residual[columns], moved[columns])
            residual.addcmul_(moved, change, value=-1)


def _refit(
    draft: _Draft, group: int, rows: slice, values: Tensor, residual: Tensor, moved: Tensor
) -> Tensor:
    """Set the best scales of a group and return their change in units [R]; the codes stay.

    Args:
        values: codes less zero points [g, R]; residual: R of these columns [g, R].
        moved: [g, R], the second moment times the values.
    """
    slope, curvature = (residual * values).sum(dim=0), (moved * values).sum(dim=0)
    if draft.scheme.granularity == "block":
        slope, curvature = _sum_over_blocks(slope), _sum_over_blocks(curvature)
    scale, unit = draft.scale[group, rows], draft.unit[rows]
    old = scale.float() / unit
    candidate = round_scale((old + slope / curvature) * unit, draft.scheme, scale.dtype)
    change = candidate.float() / unit - old
    # False, too, for a group without values, whose curvature is zero.
    better = change * (2 * slope - change * curvature) > 0
    draft.scale[group, rows] = torch.where(better, candidate, scale)
    return torch.where(better, change, torch.zeros_like(change))


def _sum_over_blocks(values: Tensor) -> Tensor:
    """Replace each of values [O] by the sum over the 128 rows that share a scale with it."""
    parts = [part.sum().expand(len(part)) for part in values.split(BLOCK_SIZE)]
    return torch.cat(parts)
