"""Polish a finished rounding: coordinate descent on its codes, closed-form refit of its scales.

No step raises tr(E H E^T), where E = W - dequantized and H includes the ridge, if any. With
R = E H at hand, the best weight in place of one code is R_j / H_jj away, and the loss grows with
the square of the distance from it, so the nearest code is the best one, on even grids and uneven
ones (coordinate descent, arXiv 2309.01885). The best change of a scale whose group k has the
values V = codes - zero_point is (R_k V^T) / (V H_kk V^T) (arXiv 2602.02126), both summed over the
rows that share the scale. Columns are treated in blocks: inside a block R follows every change; of
what changed elsewhere since its last turn a block learns by one matmul. Scales of groups that fit
into a block are refitted with it, all others once a sweep.

Memory beyond weight and H, with W for the bytes of the weight in float32, or of the rows that are
treated at a time: R 1 W, the errors that it starts from or the changes 1 W, the codes 1/4 W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.affine import (
    decode,
    relative_steps,
    round_scale,
    row_units,
)
from quantkit.numerics.columns import descend_columns
from quantkit.numerics.fp8 import repeat_block_rows
from quantkit.numerics.linalg import row_losses
from quantkit.numerics.precision import quick_products
from quantkit.schemes import BLOCK_SIZE, Scheme

_BLOCK = BLOCK_SIZE
_ROWS_AT_ONCE = {"cpu": 2048, "cuda": 1 << 20}
"""Few enough that a block of them stays in a core's cache; a multiple of 128, as they may share
scales."""

_ELEMENTS_AT_ONCE = 1 << 22
"""Of a temporary while scales of whole rows are refitted: 16 MiB of float32."""


@dataclass(frozen=True)
class _Draft:
    """A rounding that is being polished, by column of the weight; its tensors change in place.

    codes: [I, O]; scale: [G, O] in the stored dtype; zero_point: float32 [G, O] or None.
    columns: that share a scale. unit: [O], powers of two by which weights and steps are divided.
    residual: R float32 [I, O], in units, but for the changes that a block has not heard of.
    changes: float32 [I, O], by what the errors of each block changed in its last turn. added: to
    the diagonal of the second moment. quick, refits: see `polish`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    columns: int
    unit: Tensor
    residual: Tensor
    changes: Tensor
    added: Tensor
    quick: bool
    refits: bool


def polish(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
    second_moment: Tensor,
    ridge: float,
    sweeps: int,
    quick: bool = False,
    refits: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower the output error of a rounding in `sweeps` passes over its columns.

    Args:
        weight: float32 [O, I].
        codes: [O, I]; scale: as the scheme shapes it; zero_point: int8 [O, G] or None.
        second_moment: float32 [I, I].
        ridge: fraction of mean(diag H) that is added to the diagonal.
        quick: whether what changes may round its factors on its way to R (`quick_products`).
        refits: whether scales may change; else only codes do.

    Returns:
        The new codes and scales in the dtypes and shapes of the old, and the loss e H e^T of each
        row without the ridge, float64 [O].
    """
    added = ridge * second_moment.diagonal().mean()
    rows = _ROWS_AT_ONCE[weight.device.type]
    shared = BLOCK_SIZE if scheme.granularity == "block" else 1
    parts = []
    for start in range(0, len(weight), rows):
        own = slice(start, start + rows)
        scales = slice(start // shared, (start + rows) // shared)
        zero_here = None if zero_point is None else zero_point[own]
        rounding = codes[own], scale[scales], zero_here
        parts.append(
            _polish_rows(
                weight[own], *rounding, scheme, second_moment, added, sweeps, quick, refits
            )
        )
    if len(parts) == 1:
        return parts[0]
    # Bytes: not every device can join floating-point codes.
    joined = torch.cat([part[0].view(torch.int8) for part in parts]).view(codes.dtype)
    return joined, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])


def _polish_rows(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
    second_moment: Tensor,
    added: Tensor,
    sweeps: int,
    quick: bool,
    refits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`polish` for rows that share their scales with no others; `added` is what the ridge adds."""
    size = len(second_moment)
    unit = row_units(weight, scheme).T
    error = decode(codes, scale, zero_point, scheme).sub_(weight).neg_().T.div_(unit)
    with quick_products(quick):
        residual = (second_moment @ error).addcmul_(error, added)
    in_blocks = scheme.granularity == "block"
    row_scale = repeat_block_rows(scale, len(weight)) if in_blocks else scale
    # Copies even of a single row, whose transpose is contiguous already.
    draft = _Draft(
        codes=codes.T.clone(memory_format=torch.contiguous_format),
        scale=row_scale.T.clone(memory_format=torch.contiguous_format),
        zero_point=None if zero_point is None else zero_point.T.float(),
        scheme=scheme,
        columns=BLOCK_SIZE if in_blocks else size // scale.shape[1],
        unit=unit[0],
        residual=residual,
        # Row by row of its own shape.
        changes=error.zero_().T.reshape(size, -1),
        added=added,
        quick=quick,
        refits=refits,
    )
    del error
    wide = _BLOCK % draft.columns > 0
    for sweep in range(sweeps):
        for start in range(0, size, _BLOCK):
            # Nothing behind a block has changed yet in the first turns.
            behind = 0 if sweep == 0 or wide else size
            _polish_block(draft, second_moment, slice(start, min(size, start + _BLOCK)), behind)
        if wide:
            _catch_up(draft, second_moment)
            if draft.refits:
                _refit_wide_groups(draft, second_moment)
    del residual
    codes, row_scale = draft.codes.T.contiguous(), draft.scale.T
    scale = (row_scale[::BLOCK_SIZE] if in_blocks else row_scale).contiguous()
    del draft
    error = decode(codes, scale, zero_point, scheme).sub_(weight).div_(unit.T)
    with quick_products(quick):
        losses = row_losses(error, second_moment)
    return codes, scale, losses * unit[0].double().square()


def _catch_up(draft: _Draft, second_moment: Tensor) -> None:
    """Let every block hear of what changed behind it; then none has anything to hear of."""
    size = len(second_moment)
    with quick_products(draft.quick):
        for start in range(0, size - _BLOCK, _BLOCK):
            own, behind = slice(start, start + _BLOCK), slice(start + _BLOCK, size)
            draft.residual[own].addmm_(second_moment[own, behind], draft.changes[behind])
    draft.changes.zero_()


def _polish_block(draft: _Draft, second_moment: Tensor, own: slice, behind: int) -> None:
    """Improve the codes of a few columns, and their scales where no others share them.

    Args:
        behind: up to which column those behind the block have changed since its last turn.
    """
    start, stop = own.start, own.stop
    draft.changes[own] = 0
    reach = slice(0, max(start, behind))
    with quick_products(draft.quick):
        draft.residual[own].addmm_(second_moment[own, reach], draft.changes[reach])
    inner = second_moment[start:stop, start:stop].clone()
    inner.diagonal().add_(draft.added)
    groups = _groups_of(draft, own)
    steps = relative_steps(draft.scale[groups], draft.unit)
    offset = None if draft.zero_point is None else draft.zero_point[groups]
    values = draft.codes[own].float()
    # The same numbers, [S, B / S, O].
    by_group = values.unflatten(0, (len(steps), -1))
    if offset is not None:
        by_group -= offset.unsqueeze(1)
    here = draft.residual[own]
    before = by_group * steps.unsqueeze(1)
    descend_columns(values, steps, offset, here, inner, draft.scheme)
    codes = by_group if offset is None else by_group + offset.unsqueeze(1)
    draft.codes[own] = codes.view_as(values)
    if draft.refits and _BLOCK % draft.columns == 0:
        every = slice(None)
        for first in range(0, stop - start, draft.columns):
            part = slice(first, first + draft.columns)
            group = (start + first) // draft.columns
            moved = inner[:, part] @ values[part]
            change = _refit(draft, group, every, values[part], here[part], moved[part])
            here.addcmul_(moved, change, value=-1)
        steps = relative_steps(draft.scale[groups], draft.unit)
    by_group *= steps.unsqueeze(1)
    torch.sub(before.view_as(values), values, out=draft.changes[own])


def _groups_of(draft: _Draft, own: slice) -> slice | Tensor:
    """Return which scales a block has: each is for as many columns side by side."""
    if _BLOCK % draft.columns and draft.columns % _BLOCK:
        columns = torch.arange(own.start, own.stop, device=draft.codes.device)
        return columns // draft.columns
    return slice(own.start // draft.columns, -(-own.stop // draft.columns))


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
