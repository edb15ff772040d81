"""What every rounding method returns, and the guarantee that none is worse than plain rounding.

Shapes: O output features (rows of all layers that are solved together), I input features,
G groups along I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.numerics.affine import decode, row_units
from quantkit.numerics.linalg import row_losses
from quantkit.numerics.precision import quick_products
from quantkit.records import LinearPlan
from quantkit.schemes import BLOCK_SIZE, Scheme


@dataclass(frozen=True)
class Rounding:
    """Codes of the rows of one or more layers.

    codes: int8 or float8_e4m3fn [O, I]; scale: [O, G] in the stored dtype, or
    [ceil(O/128), ceil(I/128)] for blocks; zero_point: int8 [O, G] or None.
    losses: e H e^T of each row, float64 [O], and plain_losses the same for plain rounding; None
    where there was no second moment.
    damping: fraction of mean(diag H) that was added before a factorization, or None.
    plain_rows: bool [O], rows that got plain rounding because the method was not better there;
    None where the method cannot be worse. fallback: why every row got plain rounding, or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    losses: Tensor | None = None
    plain_losses: Tensor | None = None
    damping: float | None = None
    plain_rows: Tensor | None = None
    fallback: str | None = None


UNFACTORIZED = "rtn: the second moment could not be factorized under any damping"
"""Why rows got plain rounding where error compensation was asked for."""


def measure_rows(
    weight: Tensor, scheme: Scheme, second_moment: Tensor, rounding: Rounding, quick: bool = False
) -> Tensor:
    """Return e H e^T of each row of a rounding of float32 [O, I], float64 [O].

    Args:
        quick: whether products may round their factors (`quick_products`), which changes a loss by
            about 1e-3 of it where they do.
    """
    unit = row_units(weight, scheme)
    decoded = decode(rounding.codes, rounding.scale, rounding.zero_point, scheme)
    error = decoded.sub_(weight).div_(unit)
    with quick_products(quick):
        losses = row_losses(error, second_moment)
    return losses * unit.squeeze(1).double().square()


def take_rows(candidate: Rounding, plain: Rounding, rows: Tensor, scales: Tensor) -> Rounding:
    """Return the codes of a candidate, with some rows as plain rounding has them.

    Args:
        rows: bool [O]; scales: the same for the rows of the scales.
    """
    zero_point = candidate.zero_point
    if zero_point is not None and plain.zero_point is not None:
        zero_point = torch.where(rows.unsqueeze(1), plain.zero_point, zero_point)
    # Bytes: not every device can select among floating-point codes.
    codes, plain_codes = candidate.codes.view(torch.int8), plain.codes.view(torch.int8)
    return Rounding(
        codes=torch.where(rows.unsqueeze(1), plain_codes, codes).view(candidate.codes.dtype),
        scale=torch.where(scales.unsqueeze(1), plain.scale, candidate.scale),
        zero_point=zero_point,
    )


def keep_better_rows(
    weight: Tensor,
    scheme: Scheme,
    second_moment: Tensor,
    candidate: Rounding,
    plain: Rounding,
    quick: bool = False,
) -> Rounding:
    """Take each row from `candidate`, or from `plain` where that has the lower loss.

    Rows that share their scales are taken together, by the sum of their losses.

    Args:
        weight: float32 [O, I]; second_moment: float32 [I, I].
        candidate: with its losses.
        quick: see `measure_rows`.
    """
    plain_losses = measure_rows(weight, scheme, second_moment, plain, quick)
    if candidate.losses is None:
        raise ValueError("the candidate has no losses to compare by")
    # Written so that a loss that is not a number counts as worse.
    if scheme.granularity == "block":
        sums = zip(candidate.losses.split(BLOCK_SIZE), plain_losses.split(BLOCK_SIZE), strict=True)
        worse_scales = torch.stack([~(mine.sum() <= other.sum()) for mine, other in sums])
        worse = worse_scales.repeat_interleave(BLOCK_SIZE)[: len(weight)]
    else:
        worse = worse_scales = ~(candidate.losses <= plain_losses)
    return replace(
        take_rows(candidate, plain, worse, worse_scales),
        losses=torch.where(worse, plain_losses, candidate.losses),
        plain_losses=plain_losses,
        damping=candidate.damping,
        plain_rows=worse,
    )


def alike(linears: Sequence[LinearPlan]) -> list[list[int]]:
    """Return the indices of linear layers that are best solved as one matrix, in order.

    Layers in blocks of rows can be only where their rows fill the blocks. Plain rounding has no
    work that layers could share, so each is spared the copy. A custom solver is given one layer.
    Layers with one scale have it together.
    """
    members: dict[object, list[int]] = {}
    for index, linear in enumerate(linears):
        ragged = linear.scheme.granularity == "block" and linear.out_features % BLOCK_SIZE != 0
        alone = ragged or linear.method.rounder in ("rtn", "custom")
        alone = alone and not linear.one_scale
        key = (
            linear.scheme,
            linear.one_scale,
            linear.group_size,
            linear.method.rounder,
            linear.effort,
            index if alone else None,
        )
        members.setdefault(key, []).append(index)
    return list(members.values())
