"""The cheapest of many scales for each group of weights, by loops that read the weights once.

Torch passes over all weights some six times for every scale. A kernel of Triton on a GPU, and on a
processor one that numba compiles for integer codes, if it is installed, keep a group at hand while
all scales are tried on it, and store no errors. Sums over a group have another order than torch's,
so that of two scales whose costs differ by less than about 1e-6 of them either may be chosen.

Shapes: R rows, G groups of g columns, C candidates.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from quantkit.numerics import kernels
from quantkit.numerics.affine import code_range
from quantkit.numerics.threads import share_out
from quantkit.schemes import Scheme

_FEWEST_WEIGHTS = 1 << 16
"""Fewer are searched before numba is imported."""

_WEIGHTS_A_THREAD = 1 << 14
"""So few take about as long as starting a thread."""


def chooses_cheapest(weight: Tensor, scheme: Scheme) -> bool:
    """Whether to leave the search of scales for all of a weight [O, I] to `cheapest_scales`."""
    if kernels.kernels_available(weight.device):
        return True
    if weight.device.type != "cpu" or scheme.weight_kind != "int":
        return False
    return weight.numel() >= _FEWEST_WEIGHTS and find_spec("numba") is not None


def cheapest_scales(
    grouped: Tensor,
    unit: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    importance: Tensor,
    scheme: Scheme,
) -> Tensor:
    """Return which scale costs least by sum_j v_j e_j^2, int64 [R, G]; the first of equals.

    A cost that is not a number is never the least, but where it is that of the first scale.

    Args:
        grouped: weights float32 [R, G, g] divided by `unit`.
        unit: float32 [R, G].
        scales: candidates [C, R, G] in the stored dtype. zero_points: int8 [C, R, G] or None.
        importance: the weights v, float32 [R, G, g], or [1, G, g] for all rows.
        scheme: with integer codes, on a processor.
    """
    if kernels.kernels_available(grouped.device):
        return kernels.cheapest_scales(grouped, unit, scales, zero_points, importance, scheme)
    from quantkit.numerics.cheapest_compiled import choose_cheapest

    rows, groups, size = grouped.shape
    total, candidates = rows * groups, len(scales)
    found = torch.empty(total, dtype=torch.int64)
    choose = partial(
        choose_cheapest,
        grouped.reshape(total, size).contiguous().numpy(),
        unit.reshape(total).contiguous().numpy(),
        scales.float().reshape(candidates, total).contiguous().numpy(),
        None
        if zero_points is None
        else zero_points.reshape(candidates, total).contiguous().numpy(),
        importance.reshape(-1, size).contiguous().numpy(),
        *code_range(scheme.weight_bits),
        found.numpy(),
    )
    share_out(choose, total, grouped.numel() // _WEIGHTS_A_THREAD)
    return found.view(rows, groups)
