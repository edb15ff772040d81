"""Scales per channel to try in front of a group, and the rounding errors behind each of them.

Shapes: I input features, K candidates, R sampled rows of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, decode, quantize
from quantkit.numerics.linalg import Factor
from quantkit.numerics.scale_candidates import COARSE
from quantkit.numerics.scale_search import search_scales
from quantkit.records import LinearPlan
from quantkit.solvers.gptq import compensate, curvature

ELEMENTS_AT_ONCE = 1 << 21
"""Sampled weights times candidates: about ten float32 tensors of that size at a time."""

_SMALLEST = 1e-4
"""Bound of a magnitude relative to the mean: a dead channel has no scale to speak of."""


@dataclass(frozen=True)
class FoldChoice:
    """The scale to fold in front of a group.

    scale: float32 [I], all ones for the identity. exponent: power of the activation's magnitude;
    None for the identity. loss, identity_loss: what the choice was made by, lower is better.
    """

    scale: Tensor
    exponent: float | None
    loss: float
    identity_loss: float


def relative(values: Tensor) -> Tensor:
    """Divide by the mean, with a floor; all ones where the mean is zero."""
    mean = values.mean()
    relative = values / mean
    return torch.where(mean > 0, relative.clamp(min=_SMALLEST), torch.ones_like(values))


def centre(scales: Tensor) -> Tensor:
    """Divide scales [..., I] by sqrt(max * min): the largest is the inverse of the smallest."""
    largest, smallest = scales.amax(-1, keepdim=True), scales.amin(-1, keepdim=True)
    return scales / (largest * smallest).sqrt()


def pool_heads(
    values: Tensor, repeat: int, head_dim: int, combine: Callable[..., Tensor]
) -> Tensor:
    """Make [kv_head, repeat, head_dim] equal along `repeat`, keeping the shape [I].

    Args:
        combine: a reduction of torch's: `torch.mean`, `torch.amax`.
    """
    heads = values.reshape(-1, repeat, head_dim)
    return combine(heads, dim=1, keepdim=True).expand_as(heads).reshape(-1)


def sample_rows(weights: Sequence[Tensor], members: Sequence[int], count: int) -> Tensor:
    """Return rows of `weights[i]` for i in `members`, as many of all rows as `count` asks for.

    They are spread evenly: every k-th row, where k is the same for all calls with these weights.
    """
    stride = max(1, sum(len(weight) for weight in weights) // count)
    return torch.cat([weights[index] for index in members])[::stride]


def split_candidates(scales: Tensor, sample: Tensor, linear: LinearPlan) -> tuple[Tensor, ...]:
    """Split [K, I] into parts that are rounded at once; one by one where rows share scales."""
    rows = ELEMENTS_AT_ONCE // sample.numel()
    return torch.split(scales, 1 if linear.scheme.granularity == "block" else max(1, rows))


def rounding_errors(
    sample: Tensor,
    linear: LinearPlan,
    scale_dtype: torch.dtype,
    factor: Factor | None,
    scales: Tensor,
) -> Tensor:
    """Return dequantize(round(W * s)) / s - W for every candidate s, float32 [K, R, I].

    All candidates are rounded as rows of one matrix, by the rounder that comes in the end: with
    `factor` error compensation under coarsely searched scales, else to nearest under absmax.

    Args:
        sample: float32 [R, I], rows that share scheme, group size and rounder.
        linear: says which.
        factor: of the second moment of the unscaled input.
        scales: float32 [K, I]; K is 1 for schemes in blocks.
    """
    scheme, group_size = linear.scheme, linear.group_size
    tiled = sample.repeat(len(scales), 1)
    channel = scales.repeat_interleave(len(sample), dim=0)
    scaled = tiled * channel
    if linear.method.rounder == "gptq" and factor is not None:
        cost = curvature(factor) / scales.square()
        # Rows that share a scale share one candidate, and so the cost of a column.
        importance = cost[0] if len(scales) == 1 else cost.repeat_interleave(len(sample), dim=0)
        found = search_scales(scaled, scheme, group_size, scale_dtype, importance, COARSE)
        codes = compensate(tiled, *found, scheme, factor, channel)
    else:
        found = choose_absmax(scaled, scheme, group_size, scale_dtype)
        codes = quantize(scaled, *found, scheme)
    error = decode(codes, *found, scheme).sub_(scaled).div_(channel)
    return error.reshape(len(scales), *sample.shape)
