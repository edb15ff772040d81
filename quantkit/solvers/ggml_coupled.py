"""Round rows in a ggml block type so that the model's own divergence gets small.

The objective tr(F E H E^T) is that of `solvers/coupled.py`, and values are rounded as there. The
scales start from those that suit H alone, and are then polished a few rows at a time. To the loss
of row r the other rows add a shift of its weights: what the row itself still has to make up for
is its error plus t_r = sum_{k != r} F_rk E_k / F_rr. So rows with shifted weights are polished as
under H alone (`solvers/ggml_refit.py`). Rows that are polished at once do not see each other's
change. For that the curvature is raised by the largest eigenvalue of their correlation in F, which
bounds what their changes add up to: the loss does not grow.

Shapes: O output features, I input features, P panels of B rows that F couples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.numerics.affine import row_units
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.linalg import Factor
from quantkit.solvers.coupled import split_panels
from quantkit.solvers.ggml_refit import polish_blocks
from quantkit.solvers.ggml_rows import copy_blocks, put_rows, take_rows, values_to_codes
from quantkit.solvers.wavefront import Panels, compensate_panels, polish_panels

_ROWS = 32
"""Rows that are polished at once: more raise the curvature, fewer take longer."""


COUPLED, STARTED, PLAIN = 0, 1, 2
"""Where the rows of a panel come from."""


def couple_blocks(
    weight: Tensor,
    others: tuple[GgmlBlocks, GgmlBlocks],
    factor: Factor,
    second_moment: Tensor,
    ridge: float,
    fisher: Tensor,
    sweeps: int,
) -> tuple[GgmlBlocks, Tensor]:
    """Return blocks whose tr(F E H E^T) is for no panel higher than that of the others.

    Args:
        weight: float32 [O, I].
        others: to start from, with scales that suit H; and plain ones.
        factor: of the second moment, float32 [I, I].
        ridge: fraction of mean(diag H) that is added to the diagonal when polishing.
        fisher: float32 [O, B], see `solvers/coupled.py`.

    Returns:
        The blocks, and for each row COUPLED, STARTED or PLAIN, int64 [O].
    """
    started, _ = others
    result = copy_blocks(started)
    chosen = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    for rows, matrices in split_panels([fisher], weight.shape[1]):
        panels = _gather(weight, started, rows, matrices)
        compensate_panels(panels, factor)
        polish_panels(panels, second_moment, ridge, sweeps)
        codes = values_to_codes(panels.values, started.type)
        for place, matrix, new in zip(rows, matrices, codes, strict=True):
            draft = replace(take_rows(started, place), codes=new)
            for _ in range(sweeps // 2):
                draft = _polish_panel(weight[place], draft, matrix, second_moment, ridge)
            put_rows(result, place, draft)
        every = (result, *others)
        losses = torch.stack(
            [_gather(weight, each, rows, matrices).losses(second_moment) for each in every]
        )
        # A loss that is not a number is the worst.
        best = losses.nan_to_num(nan=torch.inf).argmin(dim=0)
        for place, source in zip(rows, best.tolist(), strict=True):
            chosen[place] = source
            if source != COUPLED:
                put_rows(result, place, take_rows(every[source], place))
    return result, chosen


def _gather(weight: Tensor, blocks: GgmlBlocks, rows: Tensor, fisher: Tensor) -> Panels:
    """Bring rows int64 [P, B] of a rounding into panels."""
    weight, blocks = weight[rows.flatten()], take_rows(blocks, rows.flatten())
    unit = row_units(weight)
    minimums = blocks.minimums()
    shifted = weight / unit
    if minimums is not None:
        shifted -= (minimums / unit).repeat_interleave(blocks.type.sub_block, 1)
    return Panels(
        weight=shifted.unflatten(0, rows.shape),
        values=blocks.values().unflatten(0, rows.shape),
        scale=blocks.scales().unflatten(0, rows.shape),
        zero_point=None,
        unit=unit.squeeze(1).unflatten(0, rows.shape),
        fisher=fisher,
        scheme=blocks.type,
    )


def _polish_panel(
    weight: Tensor, blocks: GgmlBlocks, fisher: Tensor, second_moment: Tensor, ridge: float
) -> GgmlBlocks:
    """Polish codes and scales of the rows [B, I] of a panel once, some rows at a time.

    Args:
        fisher: float32 [B, B], positive definite.
    """
    unit = row_units(weight)
    error = (weight - blocks.dequantize()) / unit
    result = copy_blocks(blocks)
    ratios = fisher / fisher.diagonal().unsqueeze(1)
    ratios = (ratios * (unit.T / unit)).nan_to_num_()
    for place in torch.arange(len(weight), device=weight.device).split(_ROWS):
        spread = fisher.diagonal()[place].sqrt()
        correlation = fisher[place][:, place] / spread / spread.unsqueeze(1)
        largest = float(torch.linalg.eigvalsh(correlation.double())[-1])
        shift = (ratios[place] @ error).div_(largest).nan_to_num_()
        # What a row makes up for others is never larger than its own weights: codes could not
        # follow, and no sum overflows.
        bound = (weight[place] / unit[place]).abs().amax(dim=1, keepdim=True)
        shift = torch.minimum(torch.maximum(shift, -bound), bound) * unit[place]
        draft = take_rows(result, place)
        aim = shift.add_(draft.dequantize())
        polished = polish_blocks(aim, draft, second_moment, ridge, sweeps=1)
        put_rows(result, place, polished)
        error[place] = (weight[place] - polished.dequantize()) / unit[place]
    return result
