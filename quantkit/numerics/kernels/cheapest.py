"""The cheapest of many scales for each group of weights, in one pass over the weights.

This is what AWQ's grid and GPTQ's scale search spend their time on, on a GPU. Of the two ways to
judge a fold, rounding to nearest under absmax is one matrix product, e H e^T for the errors of all
candidates, which cuBLAS does best and which would have to be summed in another order here; its
other operations are a tenth of it. The other way, `gptq`, which `method: best` takes, rounds every
candidate under searched scales: 4 scales, or 16 to 48 where the scales are final, each of which is
six passes of torch over all weights. Here the weights are read once, and no errors are stored; the
compensation that follows is `gptq_block`. A kernel for the same search is in GPTQModel
(`_scale_search_triton.py`).

All arithmetic is float32, rounded as torch rounds it; but the sum over a group, sum_j v_j e_j^2,
has another order, so that of two scales whose costs differ by less than about 1e-6 of them either
may be chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.numerics.affine import CodeSet
from quantkit.numerics.kernels.device import kernel, power_of_two, round_value, rounding_of

_ELEMENTS = 2048
"""Of a program: several groups where they are small."""


def cheapest_scales(
    grouped: Tensor,
    unit: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    importance: Tensor,
    scheme: CodeSet,
) -> Tensor:
    """Return which scale costs least by sum_j v_j e_j^2, int64 [R, G]; the first of equals.

    A cost that is not a number is never the least, but where it is that of the first scale.

    Args:
        grouped: weights float32 [R, G, g] divided by `unit`.
        unit: float32 [R, G].
        scales: candidates [C, R, G] in the stored dtype. zero_points: int8 [C, R, G] or None.
        importance: the weights v, float32 [R, G, g], or [1, G, g] for all rows.
    """
    rows, groups, size = grouped.shape
    found = torch.empty(rows, groups, dtype=torch.int64, device=grouped.device)
    width = power_of_two(size)
    at_once = max(1, _ELEMENTS // width)
    rounding, table = rounding_of(scheme, grouped.device)
    scales = scales.contiguous()
    with torch.cuda.device_of(grouped):
        _choose[(triton.cdiv(rows * groups, at_once),)](
            grouped.contiguous(),
            unit.contiguous(),
            scales,
            scales if zero_points is None else zero_points.contiguous(),
            importance.contiguous(),
            found,
            table,
            len(scales),
            rows * groups,
            groups if len(importance) == 1 else rows * groups,
            size,
            **rounding,
            SHIFTED=zero_points is not None,
            GROUPS=at_once,
            WIDTH=width,
            num_warps=4 if width <= _ELEMENTS else 8,
            enable_fp_fusion=False,
        )
    return found


@kernel
def _choose(
    grouped: tl.tensor,
    units: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    importance: tl.tensor,
    found: tl.tensor,
    table: tl.tensor,
    candidates: tl.tensor,
    total: tl.tensor,
    period: tl.tensor,
    size: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    KIND: tl.constexpr,  # noqa: N803
    ENTRIES: tl.constexpr,  # noqa: N803
    SHIFTED: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
) -> None:
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < total
    place = tl.arange(0, WIDTH)
    here = inside[:, None] & (place < size)[None, :]
    weight = tl.load(grouped + group[:, None] * size + place[None, :], mask=here, other=0.0)
    cost_of = importance + (group % period)[:, None] * size + place[None, :]
    cost_of_column = tl.load(cost_of, mask=here, other=0.0)
    unit = tl.load(units + group, mask=inside, other=1.0)
    best = tl.zeros((GROUPS,), dtype=tl.int64)
    least = tl.zeros((GROUPS,), dtype=tl.float32)
    for candidate in range(candidates):
        number = tl.full((GROUPS,), candidate, tl.int64)
        at = number * total + group
        step = tl.div_rn(tl.load(scales + at, mask=inside, other=1.0).to(tl.float32), unit)
        # The smallest normal number: see `numerics.affine.relative_steps`.
        step = tl.where(tl.abs(step) < 1.1754943508222875e-38, 1.1754943508222875e-38, step)
        step = step[:, None]
        offset = tl.zeros((GROUPS,), dtype=tl.float32)
        if SHIFTED:
            offset = tl.load(zero_points + at, mask=inside, other=0).to(tl.float32)
        value = tl.div_rn(weight, tl.broadcast_to(step, (GROUPS, WIDTH)))
        value = round_value(value, offset[:, None], low, high, table, KIND, ENTRIES)
        error = value * step - weight
        cost = tl.sum(tl.where(here, error * error * cost_of_column, 0.0), axis=1)
        better = (cost < least) | (number == 0)
        least = tl.where(better, cost, least)
        best = tl.where(better, number, best)
    tl.store(found + group, best, mask=inside)
