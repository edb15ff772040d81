"""Round to nearest with scales that minimise the output error: the rounder of AWQ.

AWQ's clip search (arXiv 2306.00978) shrinks the range of each group on its own; here the errors of
all other groups count too, so the objective is the output error of the row itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.affine import decode, quantize, row_units
from quantkit.numerics.joint_search import search_scales_jointly
from quantkit.numerics.linalg import row_losses
from quantkit.numerics.scale_search import search_scales
from quantkit.records import LayerStats
from quantkit.schemes import Effort, Scheme
from quantkit.solvers.rounding import Rounding, keep_better_rows
from quantkit.solvers.rtn import round_plainly


def round_searched(
    weight: Tensor,
    scheme: Scheme,
    group_size: int | None,
    scale_dtype: torch.dtype,
    stats: LayerStats,
    effort: Effort,
) -> Rounding:
    """Round float32 [O, I] to nearest under searched scales.

    Raises:
        ValueError: `group_size` does not divide I.
    """
    if scheme.granularity == "block":
        return _round_blocks(weight, scheme, scale_dtype, stats)
    found = search_scales_jointly(
        weight,
        scheme,
        group_size,
        scale_dtype,
        stats.second_moment,
        max(1, effort.polish_sweeps),
        quick=stats.bfloat16,
    )
    codes = quantize(weight, found.scale, found.zero_point, scheme)
    return Rounding(codes, found.scale, found.zero_point, found.losses, found.plain_losses)


def _round_blocks(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, stats: LayerStats
) -> Rounding:
    """`round_searched` where rows share their scales, which are searched by diag(H)."""
    moment = stats.second_moment
    scale, _ = search_scales(weight, scheme, None, scale_dtype, moment.diagonal())
    codes = quantize(weight, scale, None, scheme)
    unit = row_units(weight, scheme)
    error = decode(codes, scale, None, scheme).sub_(weight).div_(unit)
    losses = row_losses(error, moment) * unit.squeeze(1).double().square()
    plain = round_plainly(weight, scheme, None, scale_dtype)
    return keep_better_rows(weight, scheme, moment, Rounding(codes, scale, None, losses), plain)
