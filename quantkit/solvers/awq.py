"""Activation-aware scaling (AWQ, arXiv 2306.00978): choose the scale per channel to fold.

With the second moment H of the input, the output error of a candidate scale s is tr(E H E^T), where
E = dequantize(round(W * s)) / s - W: no forward pass is needed. Each candidate is judged with the
rounder that will be used in the end, on a sample of rows, many candidates at once as rows of one
matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.numerics.joint_search import search_scales_jointly
from quantkit.numerics.linalg import Factor, row_losses
from quantkit.numerics.precision import quick_products
from quantkit.numerics.scale_candidates import COARSE
from quantkit.records import LayerStats, LinearPlan
from quantkit.solvers.candidates import (
    FoldChoice,
    centre,
    pool_heads,
    relative,
    rounding_errors,
    sample_rows,
    split_candidates,
)
from quantkit.solvers.gptq import factor_by_activity
from quantkit.solvers.rounding import alike

_STEPS = 20
_SAMPLED_ROWS = 64
"""Rows of a group by which the candidates are ranked; they are spread evenly over all rows."""


def choose_fold(
    weights: Sequence[Tensor],
    stats: LayerStats,
    linears: Sequence[LinearPlan],
    scale_dtype: torch.dtype,
    repeat: int = 1,
    head_dim: int = 0,
) -> FoldChoice:
    """Choose the scale per input channel that lowers the output error of a group the most.

    The candidates are the identity and s = rms(x)^a / mean|w|^b for a in (0, 1] in 20 steps and
    b in {0, 1 - a}, divided by sqrt(max s * min s).

    Args:
        weights: float32 [O_i, I], one for each of `linears`; unquantized ones are not judged.
        stats: of the shared input.
        scale_dtype: of the scales of the groups.
        repeat: query heads that share a key/value head, where the fold crosses grouped attention:
            the scale is then equal along them, I being [kv_head, repeat, head_dim] flattened.

    Returns:
        The scale, with tr(E H E^T) over the sampled rows as its loss.
    """
    moment = stats.second_moment
    judged = [index for index, linear in enumerate(linears) if linear.quantized]
    weights = [weights[index] for index in judged]
    linears = [linears[index] for index in judged]
    identity = torch.ones_like(moment.diagonal())
    if not judged or stats.tokens == 0:
        return FoldChoice(identity, None, 0.0, 0.0)
    exponents, candidates = _candidates(weights, moment, repeat, head_dim)
    scales = torch.cat([identity.unsqueeze(0), candidates])
    losses = _losses(weights, linears, scale_dtype, stats, scales)
    # On a tie the identity, which comes first, wins; a loss that is not a number never does.
    best = int(losses.nan_to_num(nan=torch.inf).argmin())
    exponent = None if best == 0 else exponents[best - 1]
    return FoldChoice(scales[best], exponent, float(losses[best]), float(losses[0]))


def _candidates(
    weights: Sequence[Tensor], moment: Tensor, repeat: int, head_dim: int
) -> tuple[list[float], Tensor]:
    """Return the exponents a and the scales [K, I] of all candidates but the identity."""
    square = moment.diagonal()
    magnitude = sum((weight.abs().sum(dim=0) for weight in weights), torch.zeros_like(square))
    if repeat > 1:
        square = pool_heads(square, repeat, head_dim, torch.mean)
        magnitude = pool_heads(magnitude, repeat, head_dim, torch.mean)
    activation = relative(square.sqrt())
    magnitude = relative(magnitude)
    exponents, scales = [], []
    for step in range(1, _STEPS + 1):
        exponent = step / _STEPS
        for other in (0.0, 1.0 - exponent) if step < _STEPS else (0.0,):
            scale = activation**exponent / magnitude**other
            exponents.append(exponent)
            scales.append(scale)
    return exponents, centre(torch.stack(scales))


def _losses(
    weights: Sequence[Tensor],
    linears: Sequence[LinearPlan],
    scale_dtype: torch.dtype,
    stats: LayerStats,
    scales: Tensor,
) -> Tensor:
    """Return tr(E H E^T) over sampled rows for each of the scales [K, I], float64 [K]."""
    factor = None
    if any(linear.method.rounder == "gptq" for linear in linears):
        factor = factor_by_activity(stats)
    moment = stats.second_moment
    total = torch.zeros(len(scales), dtype=torch.float64, device=moment.device)
    for members in alike(linears):
        sample, linear = sample_rows(weights, members, _SAMPLED_ROWS), linears[members[0]]
        parts = [
            _losses_of(sample, linear, scale_dtype, stats, factor, part)
            for part in split_candidates(scales, sample, linear)
        ]
        total += torch.cat(parts)
    return total


def _losses_of(
    sample: Tensor,
    linear: LinearPlan,
    scale_dtype: torch.dtype,
    stats: LayerStats,
    factor: Factor | None,
    scales: Tensor,
) -> Tensor:
    """Return the losses [K] of rows [R, I] that share scheme, group size and rounder."""
    if linear.method.rounder == "search" and linear.scheme.granularity != "block":
        tiled = sample.repeat(len(scales), 1)
        channel = scales.repeat_interleave(len(sample), dim=0)
        losses = search_scales_jointly(
            tiled,
            linear.scheme,
            linear.group_size,
            scale_dtype,
            stats.second_moment,
            1,
            COARSE,
            channel,
            quick=stats.bfloat16,
        ).losses
    else:
        errors = rounding_errors(sample, linear, scale_dtype, factor, scales)
        with quick_products(stats.bfloat16):
            losses = row_losses(errors.flatten(0, 1), stats.second_moment)
    return losses.reshape(len(scales), -1).sum(dim=1)
