"""One scale for all weights of a layer, and of the layers that share its input.

TensorRT-LLM's FP8 kernels take one number for a weight, and where a server makes one layer of
several (q, k and v; gate and up) it rounds their codes a second time unless they share it
(TensorRT-LLM, `_torch/modules/linear.py`, `rescale_fused_weights`; vLLM,
`requantize_with_max_scale`). Steps of floating-point codes are relative, so a row loses nothing by
a scale that is too large for it until its weights become subnormal, 15 octaves below the largest.
What is left to choose is where within an octave the scale stands (`numerics/octaves.py`).

Shapes: O output features (rows of all layers that are solved together), I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.affine import quantize, round_scale
from quantkit.numerics.fp8 import LARGEST, round_to_fp8
from quantkit.numerics.linalg import sampling_ridge
from quantkit.numerics.octaves import POSITIONS
from quantkit.records import LayerStats
from quantkit.schemes import Effort, Rounder, Scheme
from quantkit.solvers.gptq import compensate, factor_by_pivot
from quantkit.solvers.polish import polish
from quantkit.solvers.rounding import UNFACTORIZED, Rounding, keep_better_rows

_ELEMENTS_AT_ONCE = 1 << 22
"""Of a temporary while scales are compared: 16 MiB of float32."""


def round_under_one_scale(
    weight: Tensor,
    scheme: Scheme,
    rounder: Rounder,
    scale_dtype: torch.dtype,
    stats: LayerStats | None,
    effort: Effort,
) -> Rounding:
    """Round float32 [O, I] to floating-point codes under one scale.

    Args:
        rounder: `gptq` compensates errors where there are statistics; any other rounds to nearest.
        stats: of the input. Without them, and for other rounders, the scale is that of the
            largest weight.

    Returns:
        The codes; scale [O, 1] holds the same number for every row.
    """
    compensates = rounder == "gptq" and stats is not None and stats.tokens > 0
    importance = stats.second_moment.diagonal() if compensates and stats is not None else None
    number = _choose_scale(weight, scheme, scale_dtype, importance)
    scale = number.expand(len(weight), 1).contiguous()
    plain = Rounding(quantize(weight, scale, None, scheme), scale, None)
    if rounder != "gptq" or stats is None:
        return plain
    if not stats.tokens:
        return Rounding(
            plain.codes, scale, None, fallback="rtn: no calibration token reached the layer"
        )
    factor = factor_by_pivot(stats)
    if factor is None:
        return Rounding(plain.codes, scale, None, fallback=UNFACTORIZED)
    codes = compensate(weight, scale, None, scheme, factor, width=effort.beam_width)
    damping = factor.damping
    del factor
    moment, quick = stats.second_moment, stats.bfloat16
    codes, _, losses = polish(
        weight,
        codes,
        scale,
        None,
        scheme,
        moment,
        sampling_ridge(stats.tokens, weight.shape[1]),
        effort.polish_sweeps,
        quick=quick,
        refits=False,
    )
    candidate = Rounding(codes, scale, None, losses, damping=damping)
    return keep_better_rows(weight, scheme, moment, candidate, plain, quick=quick)


def _choose_scale(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None
) -> Tensor:
    """Return the scale [1, 1] in `scale_dtype` that no weight is too large for.

    Args:
        importance: of squared errors in each column, float32 [I]; None: the smallest scale.
    """
    largest = torch.maximum(weight.amax(), -weight.amin()).reshape(1, 1)
    lowest = round_scale(largest / LARGEST, scheme, scale_dtype)
    if importance is None:
        return lowest
    candidates = [
        round_scale(largest / LARGEST * 2 ** (position / POSITIONS), scheme, scale_dtype)
        for position in range(POSITIONS)
    ]
    errors = [_weighted_error(weight, scale.float(), importance) for scale in candidates]
    return candidates[min(range(POSITIONS), key=errors.__getitem__)]


def _weighted_error(weight: Tensor, scale: Tensor, importance: Tensor) -> float:
    """Return the squared error of rounding to nearest, each column's by its importance."""
    total = 0.0
    for rows in weight.split(max(1, _ELEMENTS_AT_ONCE // weight.shape[1])):
        values = rows / scale
        error = round_to_fp8(values.clone()).sub_(values).square_()
        total += float((error.sum(dim=0, dtype=torch.float64) * importance.double()).sum())
    return total * float(scale.double()) ** 2
