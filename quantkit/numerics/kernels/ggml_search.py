"""The searches of ggml's K-quants: what their encoding on a GPU spends its time on.

For each of up to 37 scales, torch needs several launches for every place of a sub-block, since the
sums run from the first place to the last: some ten thousand for one tensor. Here each thread takes
a sub-block and finds everything for it in one launch. The functions are those of
`numerics.ggml.encode_k_search`, to the bit: float32 rounded as IEEE 754 says, nothing fused, sums
in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.numerics.ggml.encode_k_search import AffineGrid, symmetric_spans
from quantkit.numerics.kernels.device import hold, kernel

_BLOCKS = 128
"""Sub-blocks of a program: their weights and costs, 32 KiB, fit into the first cache."""


def search_affine(x: Tensor, weights: Tensor, grid: AffineGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Search scale and minimum of blocks by regression on the codes of a few scales.

    Args:
        x, weights: float32 [P, ...], blocks and what an error costs.

    Returns:
        Scale and minimum [...], and codes int32 [P, ...].
    """
    places, count = len(x), x[0].numel()
    scale, minimum = torch.empty_like(x[0]), torch.empty_like(x[0])
    codes = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    spans = torch.tensor(grid.spans(), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _search_affine[(triton.cdiv(count, _BLOCKS),)](
            x.contiguous(),
            weights.contiguous(),
            spans,
            scale,
            minimum,
            codes,
            count,
            len(spans),
            PLACES=places,
            TOP=grid.top,
            ABSOLUTE=grid.absolute,
            WRAPS=grid.wraps,
            BLOCKS=_BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return scale, minimum, codes


def search_symmetric(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Search the scale of blocks whose codes are -top to top - 1.

    Args:
        x, weights: float32 [P, ...], blocks and what a squared error costs.

    Returns:
        Scale [...], and codes int32 [P, ...].
    """
    places, count = len(x), x[0].numel()
    scale = torch.empty_like(x[0])
    codes = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    spans = torch.tensor([top, *symmetric_spans(top)], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _search_symmetric[(triton.cdiv(count, _BLOCKS),)](
            x.contiguous(),
            weights.contiguous(),
            spans,
            scale,
            codes,
            count,
            len(spans),
            PLACES=places,
            TOP=top,
            BLOCKS=_BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return scale, codes


@kernel
def _nearest(value: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Round to int32 as `nearest_integers` does, and hold in a range."""
    shifted = value + 12582912.0
    integer = (shifted.to(tl.int32, bitcast=True) & 0x7FFFFF) - 0x400000
    return hold(tl.where(shifted == shifted, integer, 0), low, high)


@kernel
def _affine_code(
    value: tl.tensor,
    low: tl.tensor,
    inverse: tl.tensor,
    TOP: tl.constexpr,  # noqa: N803
    wraps: tl.tensor,
) -> tl.tensor:
    value = inverse * (value - low)
    held = tl.where(value > 0.0, value, 0.0)
    held = tl.where(held > TOP, TOP * 1.0, held)
    return _nearest(tl.where(wraps, value, held), 0, TOP)


@kernel
def _affine_cost(
    weight: tl.tensor,
    value: tl.tensor,
    level: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    ABSOLUTE: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    error = scale * level + low - value
    return weight * (tl.abs(error) if ABSOLUTE else error * error)


@kernel
def _search_affine(
    x: tl.tensor,
    weights: tl.tensor,
    spans: tl.tensor,
    scales: tl.tensor,
    minimums: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    attempts: tl.tensor,
    PLACES: tl.constexpr,  # noqa: N803
    TOP: tl.constexpr,  # noqa: N803
    ABSOLUTE: tl.constexpr,  # noqa: N803
    WRAPS: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = index < count
    low = tl.load(x + index, mask=inside, other=0.0)
    high = low
    sum_w = tl.zeros((BLOCKS,), dtype=tl.float32)
    sum_x = tl.zeros((BLOCKS,), dtype=tl.float32)
    for place in range(PLACES):
        value = tl.load(x + place * count + index, mask=inside, other=0.0)
        weight = tl.load(weights + place * count + index, mask=inside, other=0.0)
        low = tl.where(value < low, value, low)
        high = tl.where(value > high, value, high)
        sum_w += weight
        # The first product is not added to a zero, whose sign it might take.
        starts = tl.full((BLOCKS,), place, tl.int32) == 0
        sum_x = tl.where(starts, weight * value, sum_x + weight * value)
    low = tl.where(low > 0.0, 0.0, low)
    flat = high == low
    first_low = low
    first_inverse = tl.div_rn(tl.full((BLOCKS,), TOP, tl.float32), high - low)
    scale = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), first_inverse)
    best_inverse, best_low, improved = first_inverse, low, flat & (flat == 0)
    least = tl.zeros((BLOCKS,), dtype=tl.float32)
    for place in range(PLACES):
        value = tl.load(x + place * count + index, mask=inside, other=0.0)
        weight = tl.load(weights + place * count + index, mask=inside, other=0.0)
        level = _affine_code(value, low, first_inverse, TOP, True).to(tl.float32)
        least += _affine_cost(weight, value, level, scale, low, ABSOLUTE)
    for attempt in range(attempts):
        span = tl.load(spans + attempt) + tl.zeros((BLOCKS,), dtype=tl.float32)
        inverse = tl.div_rn(span, high - low)
        sum_l = tl.zeros((BLOCKS,), dtype=tl.float32)
        sum_l2 = tl.zeros((BLOCKS,), dtype=tl.float32)
        sum_xl = tl.zeros((BLOCKS,), dtype=tl.float32)
        for place in range(PLACES):
            value = tl.load(x + place * count + index, mask=inside, other=0.0)
            weight = tl.load(weights + place * count + index, mask=inside, other=0.0)
            level = _affine_code(value, low, inverse, TOP, WRAPS).to(tl.float32)
            weighted = weight * level
            sum_l += weighted
            sum_l2 += weighted * level
            sum_xl += weighted * value
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_low = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        positive = new_low > 0.0
        new_scale = tl.where(positive, tl.div_rn(sum_xl, sum_l2), new_scale)
        new_low = tl.where(positive, 0.0, new_low)
        error = tl.zeros((BLOCKS,), dtype=tl.float32)
        for place in range(PLACES):
            value = tl.load(x + place * count + index, mask=inside, other=0.0)
            weight = tl.load(weights + place * count + index, mask=inside, other=0.0)
            level = _affine_code(value, low, inverse, TOP, WRAPS).to(tl.float32)
            error += _affine_cost(weight, value, level, new_scale, new_low, ABSOLUTE)
        better = (determinant > 0.0) & (error < least)
        improved = improved | better
        least = tl.where(better, error, least)
        best_inverse = tl.where(better, inverse, best_inverse)
        best_low = tl.where(better, low, best_low)
        scale = tl.where(better, new_scale, scale)
        low = tl.where(better, new_low, low)
    for place in range(PLACES):
        value = tl.load(x + place * count + index, mask=inside, other=0.0)
        # The first attempt of all rounds before it holds numbers in range.
        code = _affine_code(value, best_low, best_inverse, TOP, WRAPS | (improved == 0))
        tl.store(codes + place * count + index, tl.where(flat, 0, code), mask=inside)
    tl.store(scales + index, tl.where(flat, 0.0, scale), mask=inside)
    tl.store(minimums + index, -tl.where(flat, first_low, low), mask=inside)


@kernel
def _search_symmetric(
    x: tl.tensor,
    weights: tl.tensor,
    spans: tl.tensor,
    scales: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    attempts: tl.tensor,
    PLACES: tl.constexpr,  # noqa: N803
    TOP: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = index < count
    extreme = tl.zeros((BLOCKS,), dtype=tl.float32)
    for place in range(PLACES):
        value = tl.load(x + place * count + index, mask=inside, other=0.0)
        extreme = tl.where(tl.abs(value) > tl.abs(extreme), value, extreme)
    scale = tl.zeros((BLOCKS,), dtype=tl.float32)
    best = tl.zeros((BLOCKS,), dtype=tl.float32)
    best_inverse = tl.zeros((BLOCKS,), dtype=tl.float32)
    for attempt in range(attempts):
        span = tl.load(spans + attempt) + tl.zeros((BLOCKS,), dtype=tl.float32)
        inverse = tl.div_rn(-span, extreme)
        sum_lx = tl.zeros((BLOCKS,), dtype=tl.float32)
        sum_l2 = tl.zeros((BLOCKS,), dtype=tl.float32)
        for place in range(PLACES):
            value = tl.load(x + place * count + index, mask=inside, other=0.0)
            weight = tl.load(weights + place * count + index, mask=inside, other=0.0)
            level = _nearest(inverse * value, -TOP, TOP - 1).to(tl.float32)
            sum_lx += weight * value * level
            sum_l2 += weight * level * level
        fitted = tl.div_rn(sum_lx, sum_l2)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        # The first attempt is taken whatever it gains.
        first = tl.where(sum_l2 != 0.0, fitted, 0.0)
        starts = tl.full((BLOCKS,), attempt, tl.int32) == 0
        fitted = tl.where(starts, first, fitted)
        better = better | starts
        scale = tl.where(better, fitted, scale)
        best = tl.where(better, fitted * sum_lx, best)
        best_inverse = tl.where(better, inverse, best_inverse)
    # Blocks whose largest magnitude is below this are zeros.
    zero = tl.abs(extreme) < 1e-15
    for place in range(PLACES):
        value = tl.load(x + place * count + index, mask=inside, other=0.0)
        code = _nearest(best_inverse * value, -TOP, TOP - 1)
        tl.store(codes + place * count + index, tl.where(zero, -TOP, code), mask=inside)
    tl.store(scales + index, tl.where(zero, 0.0, scale), mask=inside)
