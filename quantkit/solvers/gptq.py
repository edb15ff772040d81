"""Error-compensated rounding (GPTQ, arXiv 2210.17323), with searched scales.

With H = L L^T for lower L, the loss tr(E H E^T) of errors E = W - dequantized is the sum over
columns j of ((E L)_j)^2, and (E L)_j depends on the errors of columns j and later only. So the
columns are rounded from the last to the first, each to the code nearest to its weight plus what
compensates the errors so far: the nearest-plane view of arXiv 2507.18553. It chooses the same
codes as the textbook loop over the inverse, needs no inverse, and shows what each rounding error
costs, L_jj^2, by which the scales are searched beforehand. The columns with the largest L_jj come
last in the order and are rounded first. The scales stay in groups of the original columns, so a
reader needs no permutation. Then codes and scales are polished.

Memory beyond weight and H, with W and H for the bytes of either in float32: the factor 1 H and,
while it is found, 0.4 H; the errors 1 W, the codes 1/4 W; after the factor is freed, at most 3 W.

Floating-point codes are rounded the same way: the nearest plane is the nearest value of a code.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.numerics import pivoting
from quantkit.numerics.affine import CodeSet, code_dtype, relative_steps, row_units
from quantkit.numerics.columns import round_columns
from quantkit.numerics.fp8 import repeat_block_rows
from quantkit.numerics.linalg import Factor, factor_moment, sampling_ridge
from quantkit.numerics.memory import return_freed_memory
from quantkit.numerics.scale_search import search_scales
from quantkit.records import LayerStats
from quantkit.schemes import BLOCK_SIZE, Effort, Scheme
from quantkit.solvers.beam import round_block_widely
from quantkit.solvers.polish import polish
from quantkit.solvers.rounding import UNFACTORIZED, Rounding, keep_better_rows
from quantkit.solvers.rtn import round_plainly

_BLOCK = 128
"""Columns whose compensation is applied one by one; all others get it by one matmul a block."""

_LARGE = 64 << 20
"""Bytes of a second moment in RAM, whose factor takes as many, from which on it is worth a
millisecond to give the holes between freed tensors back first."""


def round_compensated(
    weight: Tensor,
    scheme: Scheme,
    group_size: int | None,
    scale_dtype: torch.dtype,
    stats: LayerStats,
    effort: Effort,
) -> Rounding:
    """Round float32 [O, I] column by column, later columns making up for earlier ones.

    Raises:
        ValueError: `group_size` does not divide I.
    """
    plain = round_plainly(weight, scheme, group_size, scale_dtype)
    factor = factor_by_pivot(stats)
    if factor is None:
        return replace(plain, fallback=UNFACTORIZED)
    scale, zero_point = search_scales(weight, scheme, group_size, scale_dtype, curvature(factor))
    codes = compensate(weight, scale, zero_point, scheme, factor, width=effort.beam_width)
    damping = factor.damping
    del factor
    # Descent needs no damping to be stable, and does best without, in and out of the domain of
    # the calibration text; the ridge is for what few tokens do not tell.
    ridge = sampling_ridge(stats.tokens, weight.shape[1])
    codes, scale, losses = polish(
        weight,
        codes,
        scale,
        zero_point,
        scheme,
        stats.second_moment,
        ridge,
        effort.polish_sweeps,
        quick=stats.bfloat16,
    )
    candidate = Rounding(codes, scale, zero_point, losses, damping=damping)
    return keep_better_rows(
        weight, scheme, stats.second_moment, candidate, plain, quick=stats.bfloat16
    )


def factor_by_pivot(stats: LayerStats) -> Factor | None:
    """Return the factor of the second moment in the order of rising pivots."""
    moment = stats.second_moment
    if moment.device.type == "cpu" and moment.nbytes >= _LARGE:
        return_freed_memory()
    return pivoting.factor_by_pivot(moment, sampling_ridge(stats.tokens, len(moment)))


def factor_by_activity(stats: LayerStats) -> Factor | None:
    """Return the factor of the second moment in the order of rising activity: quick to find."""
    moment = stats.second_moment
    order = torch.argsort(moment.diagonal(), stable=True)
    return factor_moment(moment, order, sampling_ridge(stats.tokens, len(order)), torch.float32)


def curvature(factor: Factor) -> Tensor:
    """Return what a unit of squared rounding error costs in each column, float32 [I].

    Sum_j L_jj^2 (e_j)^2 is the loss of compensated rounding, e_j being the error against the
    compensated weight, which rounding to nearest bounds by half a step.
    """
    result = torch.empty(len(factor.order), device=factor.order.device)
    result[factor.order] = factor.lower.diagonal().square().float()
    return result


def compensate(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: CodeSet,
    factor: Factor,
    channel_scale: Tensor | None = None,
    width: int = 1,
) -> Tensor:
    """Return the codes [O, I] that nearest-plane rounding chooses under fixed scales.

    Args:
        weight: float32 [O, I].
        scale: [O, G], or [ceil(O/128), ceil(I/128)] for blocks; zero_point: int8 [O, G] or None.
        scheme: where it is a ggml type, the codes are the values that they stand for.
        channel_scale: float32 [O, I], positive, or None. Where given, codes stand for
            `weight * channel_scale`, and errors are divided by the channel scale before they
            meet the factor.
        width: how many roundings of a row to follow at a time within a block of columns.
    """
    rows, size = weight.shape
    if isinstance(scheme, Scheme) and scheme.granularity == "block":
        scale, columns_of_scale = repeat_block_rows(scale, rows), BLOCK_SIZE
    else:
        columns_of_scale = size // scale.shape[1]
    group_of = factor.order // columns_of_scale
    unit = row_units(weight, scheme)
    steps = relative_steps(scale, unit).T.contiguous()
    offsets = None if zero_point is None else zero_point.T.float().contiguous()
    errors = torch.empty(size, rows, device=weight.device)
    codes = torch.empty(size, rows, dtype=code_dtype(scheme), device=weight.device)
    pivots = factor.lower.diagonal()
    for stop in range(size, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        columns = factor.order[start:stop]
        # Contiguous by column of the weight: [block, O].
        block = (weight.index_select(1, columns) / unit).T.contiguous()
        panel = (factor.lower[start:, start:stop] / pivots[start:stop]).float()
        target = torch.addmm(block, panel[stop - start :].T, errors[stop:])
        groups = group_of[start:stop]
        step = steps.index_select(0, groups)
        if channel_scale is not None:
            step /= channel_scale.index_select(1, columns).T
        offset = None if offsets is None else offsets.index_select(0, groups)
        lower = panel[: stop - start].contiguous()
        if width == 1:
            round_columns(block, target, lower, step, offset, scheme, errors[start:stop])
        else:
            cost = pivots[start:stop].square().float()
            round_block_widely(block, target, lower, cost, step, offset, scheme, width)
            torch.addcmul(block, target, step, value=-1, out=errors[start:stop])
        codes[start:stop] = target if offset is None else target.add_(offset)
    position = torch.empty_like(factor.order)
    position[factor.order] = torch.arange(size, device=weight.device)
    # Bytes: not every device can index floating-point codes.
    ordered = codes.view(torch.int8).index_select(0, position).T.contiguous()
    return ordered.view(codes.dtype)
