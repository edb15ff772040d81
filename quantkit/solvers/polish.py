"""Polish a finished rounding: coordinate descent on its codes, closed-form refit of its scales.

No step raises tr(E H E^T), where E = W - dequantized and H includes the ridge, if any. With
R = E H at hand, the best change of one code is R_j / (H_jj s) steps (coordinate descent, arXiv
2309.01885), and the best change of the scale of a group k with values V = codes - zero_point is
(R_k V^T) / (V H_kk V^T) (arXiv 2602.02126). Columns are treated in blocks: inside a block R
follows every change, elsewhere one matmul a block does.

Memory beyond weight and H, with W for the bytes of the weight in float32: R 1 W, the errors that
it starts from 1 W, the codes 1/4 W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.affine import code_range, dequantize, round_scale, row_units
from quantkit.schemes import Scheme

_BLOCK = 128


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

    Scales are refitted where groups do not straddle the blocks of 128 columns.

    Args:
        weight: float32 [O, I].
        codes: int8 [O, I]; scale: [O, G]; zero_point: int8 [O, G] or None.
        second_moment: float32 [I, I].
        ridge: fraction of mean(diag H) that is added to the diagonal.

    Returns:
        The new codes int8 [O, I] and scales [O, G] in the dtype of `scale`, and the loss
        e H e^T of each row without the ridge, float64 [O].
    """
    size = len(second_moment)
    columns = size // scale.shape[1]
    added = ridge * second_moment.diagonal().mean()
    unit = row_units(weight).T
    error = dequantize(codes, scale, zero_point).sub_(weight).neg_().T.div_(unit)
    # From here on by column of the weight: [I, O] and [G, O].
    residual = torch.addcmul(second_moment @ error, error, added)
    del error
    # Copies even of a single row, whose transpose is contiguous already.
    codes, scale = (
        matrix.T.clone(memory_format=torch.contiguous_format) for matrix in (codes, scale)
    )
    zero = None if zero_point is None else zero_point.T.float()
    group_of = torch.arange(size, device=weight.device) // columns
    for start in [*range(0, size, _BLOCK)] * sweeps:
        stop = min(size, start + _BLOCK)
        groups = group_of[start:stop]
        inner = second_moment[start:stop, start:stop].clone()
        inner.diagonal().add_(added)
        here = residual[start:stop]
        steps = scale.float().index_select(0, groups).div_(unit)
        values = codes[start:stop].float()
        offset = None if zero is None else zero.index_select(0, groups)
        before = _times(values, offset, steps)
        _descend(values, steps, here, inner, code_range(scheme.weight_bits))
        codes[start:stop] = values
        if offset is not None:
            values -= offset
        if _BLOCK % columns == 0:
            for first in range(0, stop - start, columns):
                part = slice(first, first + columns)
                group = (start + first) // columns
                scale[group] = _refit(values, part, scale[group], unit[0], here, inner, scheme)
            steps = scale.float().index_select(0, groups).div_(unit)
        change = before.sub_(values.mul_(steps))
        residual[:start].addmm_(second_moment[:start, start:stop], change)
        residual[stop:].addmm_(second_moment[stop:, start:stop], change)
    codes, scale = codes.T.contiguous(), scale.T.contiguous()
    error = dequantize(codes, scale, zero_point).sub_(weight).neg_().T.div_(unit)
    losses = torch.sum(residual.mul_(error), dim=0, dtype=torch.float64)
    losses -= added * torch.sum(error.square_(), dim=0, dtype=torch.float64)
    return codes, scale, losses * unit[0].double().square()


def _times(codes: Tensor, offset: Tensor | None, steps: Tensor) -> Tensor:
    return codes * steps if offset is None else (codes - offset).mul_(steps)


def _descend(
    codes: Tensor, steps: Tensor, residual: Tensor, inner: Tensor, limits: tuple[int, int]
) -> None:
    """Move each code of a block [B, O] to its best value, one column after the other, in place."""
    diagonal = inner.diagonal().unsqueeze(1)
    # A column that was never active has no best value: its codes stay.
    gain = torch.where(diagonal > 0, 1.0 / (diagonal * steps), torch.zeros_like(steps))
    new = torch.empty_like(codes[0])
    for column in range(len(codes)):
        code = codes[column]
        torch.addcmul(code, residual[column], gain[column], out=new).round_().clamp_(*limits)
        change = code.sub_(new).mul_(steps[column])
        residual.addr_(inner[column], change)
        code.copy_(new)


def _refit(
    values: Tensor,
    part: slice,
    scale: Tensor,
    unit: Tensor,
    residual: Tensor,
    inner: Tensor,
    scheme: Scheme,
) -> Tensor:
    """Return the best scale [O] of the group `part` of a block's values [B, O].

    `residual` [B, O] follows the change.
    """
    values = values[part]
    curvature = (inner[part, part] @ values).mul_(values).sum(dim=0)
    slope = (residual[part] * values).sum(dim=0)
    old = scale.float() / unit
    candidate = round_scale((old + slope / curvature) * unit, scheme, scale.dtype)
    change = candidate.float() / unit - old
    # False, too, for a group without values, whose curvature is zero.
    better = change * (2 * slope - change * curvature) > 0
    change = torch.where(better, change, torch.zeros_like(change))
    residual.addmm_(inner[:, part], values * change, alpha=-1)
    return torch.where(better, candidate, scale)
