"""The second moment of a layer's input, accumulated batch by batch.

Sums are kept in float32 and divided by the token count once at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.records import LayerStats

_COLUMNS = 256
"""Width of the panels of the sum: what lies below them follows by symmetry."""


@dataclass
class Moment:
    """A running sum of x x^T over tokens. total: float32 [I, I]."""

    total: Tensor
    weight: float
    tokens: int


def empty_moment(features: int, device: torch.device) -> Moment:
    """Return a sum over no tokens."""
    total = torch.zeros(features, features, dtype=torch.float32, device=device)
    return Moment(total, 0.0, 0)


def accumulate(moment: Moment, inputs: Tensor, weights: Tensor | None) -> None:
    """Add the tokens of `inputs` [..., I] to the sum; only its upper triangle is kept up to date.

    Args:
        moment: changed in place.
        inputs: activations in any floating dtype.
        weights: float32 weights of the tokens, shaped as `inputs` without its last axis; None
            where every token counts once.
    """
    rows = _weighted(inputs.reshape(-1, inputs.shape[-1]), weights)
    if rows.dtype != torch.bfloat16 and not rows.is_cuda:
        rows = rows.to(torch.float32)
    for start in range(0, rows.shape[1], _COLUMNS):
        left = rows[:, start : start + _COLUMNS].T
        _add_product(moment.total[start : start + _COLUMNS, start:], left, rows[:, start:])
    count = rows.shape[0]
    moment.weight += count if weights is None else float(weights.sum())
    moment.tokens += count if weights is None else int((weights > 0).sum())


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, summed in float32 whatever the dtype of the factors."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        high, low = split_product(left, right)
        total.add_(high).add_(low)


def split_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return a bfloat16 product in two bfloat16 parts whose sum has 16 bits of mantissa.

    A CPU sums bfloat16 products in float32 and rounds the result; the second product subtracts
    the rounded first before it is rounded itself. Two of them still take half the time of a
    float32 product where bfloat16 is fast at all.
    """
    high = left @ right
    return high, torch.addmm(high, left, right, beta=-1)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return rows
    return rows * weights.reshape(-1, 1).sqrt().to(rows.dtype)


def finish(moment: Moment) -> LayerStats:
    """Return the mean over tokens; `moment` is used up.

    A sum that is not finite stays so: the caller names the layer in its error.
    """
    moment.total /= max(moment.weight, 1.0)
    for start in range(0, len(moment.total), _COLUMNS):
        stop = start + _COLUMNS
        moment.total[stop:, start:stop] = moment.total[start:stop, stop:].T
    return LayerStats(second_moment=moment.total, tokens=moment.tokens)
