"""Round to nearest with scales that minimise the output error: the rounder of AWQ.

AWQ's clip search (arXiv 2306.00978) shrinks the range of each group on its own; here the errors of
all other groups count too, so the objective is the output error of the row itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.affine import quantize
from quantkit.numerics.scale_search import search_scales_jointly
from quantkit.records import LayerStats
from quantkit.schemes import Scheme
from quantkit.solvers.rounding import Rounding

_SWEEPS = 2


def round_searched(
    weight: Tensor,
    scheme: Scheme,
    group_size: int | None,
    scale_dtype: torch.dtype,
    stats: LayerStats,
) -> Rounding:
    """Round float32 [O, I] to nearest under searched scales.

    Raises:
        ValueError: `group_size` does not divide I.
    """
    found = search_scales_jointly(
        weight, scheme, group_size, scale_dtype, stats.second_moment, _SWEEPS
    )
    codes = quantize(weight, found.scale, found.zero_point, scheme.weight_bits)
    return Rounding(codes, found.scale, found.zero_point, found.losses, found.plain_losses)
