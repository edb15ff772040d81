"""The second moment of a layer's input, accumulated batch by batch.

Sums are kept in float32 and divided by the token count once at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.records import LayerStats


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
    """Add the tokens of `inputs` [..., I] to the sum.

    Args:
        moment: changed in place.
        inputs: activations in any floating dtype.
        weights: float32 weights of the tokens, shaped as `inputs` without its last axis; None
            where every token counts once.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if rows.is_cuda and rows.dtype != torch.float32:
        rows = _weighted(rows, weights)
        # bf16 products are exact in float32, which the tensor cores accumulate in.
        moment.total += torch.mm(rows.T, rows, out_dtype=torch.float32)
    else:
        rows = _weighted(rows.to(torch.float32), weights)
        moment.total.addmm_(rows.T, rows)
    count = rows.shape[0]
    moment.weight += count if weights is None else float(weights.sum())
    moment.tokens += count if weights is None else int((weights > 0).sum())


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return rows
    return rows * weights.reshape(-1, 1).sqrt().to(rows.dtype)


def finish(moment: Moment) -> LayerStats:
    """Return the mean over tokens; `moment` is used up.

    A sum that is not finite stays so: the caller names the layer in its error.
    """
    moment.total /= max(moment.weight, 1.0)
    return LayerStats(second_moment=moment.total, tokens=moment.tokens)
