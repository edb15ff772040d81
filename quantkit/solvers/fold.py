"""Fold a scale per channel into the operation in front of a group of linear layers.

The linear layers' columns are multiplied by the scale, so the operation in front is divided by it
and the product stays what it was. Shapes: O output features of the operation in front.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from quantkit.records import LayerStats, QuantizedLayer

_LARGEST_ROUNDING = 0.01
"""Relative change of a scale by rounding from which on a fold does more harm than good."""


def fold_into_norm(
    weight: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Divide the weight (and bias) of a norm by `scale`.

    Args:
        weight: [I], and bias [I] or None, in the checkpoint's dtype.
        scale: float32 [I], positive.

    Returns:
        The new weight and bias in their dtypes, and the scale float32 [I] that was really folded:
        weight divided by new weight, so that the rounding of the new weight costs nothing when
        the linear layers are multiplied by it. A channel whose weight would leave the range of
        the dtype keeps it, with a scale of 1.
    """
    new = (weight.float() / scale).to(weight.dtype)
    effective = weight.float() / new.float()
    keeps = ~(effective.isfinite() & (effective > 0) & new.isfinite())
    new = torch.where(keeps, weight, new)
    effective = torch.where(keeps, torch.ones_like(effective), effective)
    new_bias = None if bias is None else fold_into_bias(bias, effective)
    return new, new_bias, effective


def fold_into_layer(layer: QuantizedLayer, scale: Tensor) -> tuple[QuantizedLayer, Tensor] | None:
    """Divide the rows of a quantized layer by `scale` [O], by dividing the scales of its groups.

    Returns:
        The folded layer, and the scale float32 [O] that was really folded: where a row has one
        scale, the old one divided by the new one, so that its rounding costs nothing. None where
        rows share scales, and where rounding to the dtype of the scales would change one of them
        by more than 1 % (it would leave the normal range of float16, for instance).
    """
    if layer.scheme.granularity == "block":
        return None
    old = layer.scale.float()
    exact = old / scale.unsqueeze(1)
    rounded = exact.to(layer.scale.dtype)
    deviation = (rounded.float() - exact).abs()
    if not bool((deviation <= _LARGEST_ROUNDING * exact).all()):
        return None
    effective = (old / rounded.float()).squeeze(1) if old.shape[1] == 1 else scale
    return dataclasses.replace(layer, scale=rounded), effective


def fold_into_dense(
    weight: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Divide the rows of an unquantized weight [O, I] (and its bias [O]) by `scale` [O]."""
    new = (weight.float() / scale.unsqueeze(1)).to(weight.dtype)
    return new, None if bias is None else fold_into_bias(bias, scale)


def fold_into_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Divide a bias [O] by `scale` [O], in its own dtype."""
    return (bias.float() / scale).to(bias.dtype)


def collapse_heads(scale: Tensor, repeat: int, head_dim: int) -> Tensor:
    """Return the scale of v_proj's rows for one of o_proj's columns in grouped attention.

    o_proj's input is [kv_head, repeat, head_dim] flattened, and heads that share a key/value head
    share their scales. Without grouping the scale is returned as it is.

    Args:
        scale: [kv_heads * repeat * head_dim], equal along `repeat`.

    Returns:
        [kv_heads * head_dim].
    """
    if repeat == 1:
        return scale
    return scale.reshape(-1, repeat, head_dim)[:, 0].reshape(-1)


def expand_heads(scale: Tensor, repeat: int, head_dim: int) -> Tensor:
    """Undo `collapse_heads`: [kv_heads * head_dim] to [kv_heads * repeat * head_dim]."""
    if repeat == 1:
        return scale
    heads = scale.reshape(-1, 1, head_dim)
    return heads.expand(-1, repeat, -1).reshape(-1)


def scale_stats(stats: LayerStats, scale: Tensor, *, spent: bool = False) -> LayerStats:
    """Return the statistics of the input after it was divided by `scale` [I].

    Args:
        spent: whether `stats` are of no use afterwards: what is [I, I] is then divided in place,
            since a copy of it may be as large as all else that a job holds.
    """
    inverse = 1.0 / scale

    def divide(matrix: Tensor) -> Tensor:
        divided = matrix.mul_(inverse) if spent else matrix * inverse
        return divided.mul_(inverse.unsqueeze(1))

    return dataclasses.replace(
        stats,
        second_moment=divide(stats.second_moment),
        drift=None if stats.drift is None else divide(stats.drift),
        mean=None if stats.mean is None else stats.mean * inverse,
        absmax=None if stats.absmax is None else stats.absmax * inverse,
        sample=None if stats.sample is None else stats.sample * inverse,
        drift_sample=None if stats.drift_sample is None else stats.drift_sample * inverse,
    )
