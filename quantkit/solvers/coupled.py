"""Rounding that lowers the model's own divergence: rows make up for each other as columns do.

How far the quantized model's next-token distributions are from the original's is, to second order
in the error E of one layer, the mean over tokens of (g^T E x)^2: x is the layer's input, and g the
gradient at its output of the log-probability of a token that the model itself drew. With
H = mean x x^T, F = mean g g^T, and the two taken for independent, that is tr(F E H E^T); F is a
block of the Fisher matrix (YAQA, arXiv 2505.22988; the factors are those of K-FAC, arXiv
1503.05671). GPTQ has the identity in the place of F: it knows which inputs matter, and takes all
outputs for equal and apart. Where F couples outputs, the error of one row can be made up for in
another.

The scales are searched as GPTQ's are, since what a unit of error costs in a column does not depend
on the row. Then values are rounded one after the other and polished (`solvers/wavefront.py`), the
rows that matter most coming first, as GPTQ does it with columns.

F is known in diagonal blocks, as `fisher` [O, B]: its entry [i, j] couples row i with row
(i // B) * B + j. Shapes: O output features, I input features, G groups along I, B rows of a block.

Memory beyond what gptq takes, with H for the bytes of H in float32: 2 H, and at a time eight copies
of a few million weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.numerics.affine import row_units
from quantkit.numerics.linalg import sampling_ridge
from quantkit.numerics.scale_search import search_scales
from quantkit.records import LayerStats
from quantkit.schemes import Effort, Scheme
from quantkit.solvers.gptq import curvature, factor_by_activity
from quantkit.solvers.rounding import UNFACTORIZED, Rounding, measure_rows, take_rows
from quantkit.solvers.rtn import round_plainly
from quantkit.solvers.wavefront import (
    Panels,
    compensate_panels,
    polish_panels,
    widen,
)

_DAMPING = 0.3
"""Fraction of mean(diag F) that is added to its diagonal. On a trained Llama 0.1 and 1 both gave a
higher divergence: F is an estimate, and tokens are not all alike."""

_WEIGHTS_AT_ONCE = 1 << 23
"""Weights whose rows are rounded side by side, if more than one block of F has them."""


def round_coupled(
    weight: Tensor,
    scheme: Scheme,
    group_size: int | None,
    scale_dtype: torch.dtype,
    stats: LayerStats,
    effort: Effort,
    fishers: Sequence[Tensor],
) -> Rounding:
    """Round float32 [O, I] so that tr(F E H E^T) gets small.

    Rows that F couples get plain rounding together where that has the lower loss.

    Args:
        fishers: float32 [O_i, B_i] each, of the layers whose rows are joined in `weight`.

    Raises:
        ValueError: `group_size` does not divide I, or rows of the scheme share their scales.
    """
    if scheme.granularity == "block":
        raise ValueError(f"scheme {scheme.name}: rows that share scales cannot be rounded in turn")
    plain = round_plainly(weight, scheme, group_size, scale_dtype)
    factor = factor_by_activity(stats)
    if factor is None:
        return replace(plain, fallback=UNFACTORIZED)
    scale, zero_point = search_scales(weight, scheme, group_size, scale_dtype, curvature(factor))
    candidate = Rounding(plain.codes.clone(), scale, zero_point)
    plain_rows = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    ridge = sampling_ridge(stats.tokens, weight.shape[1])
    for rows, fisher in split_panels(fishers, weight.shape[1]):
        panels = _gather(weight, candidate, scheme, rows, fisher)
        compensate_panels(panels, factor)
        polish_panels(panels, stats.second_moment, ridge, effort.polish_sweeps)
        others = _gather(weight, plain, scheme, rows, fisher)
        losses = (each.losses(stats.second_moment) for each in (panels, others))
        # Written so that a loss that is not a number counts as worse.
        worse = ~torch.le(*losses)
        plain_rows[rows[worse]] = True
        _scatter(panels, rows, candidate)
    candidate = take_rows(candidate, plain, plain_rows, plain_rows)
    return replace(
        candidate,
        losses=measure_rows(weight, scheme, stats.second_moment, candidate),
        plain_losses=measure_rows(weight, scheme, stats.second_moment, plain),
        damping=factor.damping,
        plain_rows=plain_rows,
    )


def split_panels(fishers: Sequence[Tensor], columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows int64 [P, B], those that matter most first, and their F [P, B, B], damped.

    Blocks of the same size come side by side, as long as they do not have too many weights.
    """
    rows: list[Tensor] = []
    blocks: list[Tensor] = []
    start = 0
    for fisher in fishers:
        for block in fisher.split(fisher.shape[1]):
            size = len(block)
            full = blocks and (len(blocks) + 1) * size * columns > _WEIGHTS_AT_ONCE
            if blocks and (full or len(blocks[0]) != size):
                yield torch.stack(rows), torch.stack(blocks)
                rows, blocks = [], []
            order, damped = _damp(block[:, :size])
            rows.append(order + start)
            blocks.append(damped)
            start += size
    yield torch.stack(rows), torch.stack(blocks)


def _damp(fisher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of falling importance and F in it, damped; the identity if F is nothing."""
    diagonal = fisher.diagonal()
    mean = float(diagonal.double().mean())
    order = torch.argsort(diagonal, descending=True, stable=True)
    if not mean > 0:
        # No token reached the rows.
        return order, torch.eye(len(order), device=fisher.device)
    damped = fisher[order][:, order].double() / mean
    damped.diagonal().add_(_DAMPING)
    return order, damped.float()


def _gather(
    weight: Tensor, rounding: Rounding, scheme: Scheme, rows: Tensor, fisher: Tensor
) -> Panels:
    """Bring rows int64 [P, B] of a rounding into panels."""
    scale = rounding.scale[rows]
    # Bytes: not every device can index floating-point codes.
    values = rounding.codes.view(torch.int8)[rows].view(rounding.codes.dtype).float()
    zeros = None if rounding.zero_point is None else rounding.zero_point[rows].float()
    if zeros is not None:
        values -= widen(zeros, values.shape[2])
    unit = row_units(weight)
    return Panels(
        weight=(weight / unit)[rows],
        values=values,
        scale=scale,
        zero_point=zeros,
        unit=unit.squeeze(1)[rows],
        fisher=fisher,
        scheme=scheme,
    )


def _scatter(panels: Panels, rows: Tensor, rounding: Rounding) -> None:
    """Write panels to the rows of a rounding that they came from."""
    values = panels.values
    if panels.zero_point is not None:
        values = values + widen(panels.zero_point, values.shape[2])
    codes = values.to(rounding.codes.dtype)
    rounding.codes.view(torch.int8)[rows] = codes.view(torch.int8)
    rounding.scale[rows] = panels.scale
