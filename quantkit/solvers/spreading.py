"""Rows of a weight rounded by several processes: each rounds a share, and all get the whole.

Given the second moment of the input no row depends on another, or on another block of 128 rows
where these share their scales. Every process factorizes the second moment, which has the same bits
on each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.ranks import Ranks, from_first, gather
from quantkit.schemes import BLOCK_SIZE, Scheme
from quantkit.solvers.ggml import GgmlSolution, explain_plain_rows
from quantkit.solvers.rounding import Rounding


def spread_rows(
    ranks: Ranks, weight: Tensor, scheme: Scheme, solve: Callable[[Tensor], Rounding]
) -> Rounding:
    """Return `solve(weight)` of float32 [O, I], each rank solving its share of the rows.

    Raises:
        ResourceError: a rank has died.
    """
    if ranks.size == 1:
        return solve(weight)
    mine = ranks.share(len(weight), BLOCK_SIZE if scheme.granularity == "block" else 1)
    part = solve(weight[mine]) if mine.start < mine.stop else None
    return join_roundings([each for each in gather(ranks, part) if each is not None])


def join_roundings(parts: Sequence[Rounding]) -> Rounding:
    """Return the rounding of all rows; the parts are in their order."""
    fallbacks = [part.fallback for part in parts]
    plain_rows: Sequence[Tensor | None] = [part.plain_rows for part in parts]
    if any(fallbacks) and not all(fallbacks):
        plain_rows = [_find_plain_rows(part) for part in parts]
    return Rounding(
        codes=_join_codes([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=_join([part.zero_point for part in parts]),
        losses=_join([part.losses for part in parts]),
        plain_losses=_join([part.plain_losses for part in parts]),
        damping=next((part.damping for part in parts if part.damping is not None), None),
        plain_rows=_join(plain_rows),
        fallback=fallbacks[0] if all(fallbacks) else None,
    )


def _find_plain_rows(part: Rounding) -> Tensor:
    if part.plain_rows is not None:
        return part.plain_rows
    rows = torch.zeros(len(part.codes), dtype=torch.bool, device=part.codes.device)
    return rows.fill_(part.fallback is not None)


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows of all parts, or None where a part has none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _join_codes(parts: Sequence[Tensor]) -> Tensor:
    # Bytes: not every device can join floating-point codes.
    return torch.cat([part.view(torch.int8) for part in parts]).view(parts[0].dtype)


def spread_blocks(
    ranks: Ranks,
    weights: Sequence[Tensor],
    solve: Callable[[Sequence[Tensor]], tuple[GgmlSolution, ...]],
) -> tuple[GgmlSolution, ...]:
    """Return `solve(weights)` of float32 [O_i, I] each, each rank solving its share of every one.

    Raises:
        ResourceError: a rank has died.
    """
    if ranks.size == 1:
        return solve(weights)
    if any(len(weight) < ranks.size for weight in weights):
        # Not a row for each; and found by each alone, not all may have the same bits.
        return from_first(ranks, lambda: solve(weights))
    mine = solve([weight[ranks.share(len(weight))] for weight in weights])
    return tuple(_join_solutions(parts) for parts in zip(*gather(ranks, mine), strict=True))


def _join_solutions(parts: Sequence[GgmlSolution]) -> GgmlSolution:
    first, blocks = parts[0], [part.blocks for part in parts]
    plain_rows = _join([part.plain_rows for part in parts])
    return replace(
        first,
        blocks=replace(
            first.blocks,
            codes=torch.cat([each.codes for each in blocks]),
            d=torch.cat([each.d for each in blocks]),
            m=_join([each.m for each in blocks]),
            sub_scales=_join([each.sub_scales for each in blocks]),
            sub_minimums=_join([each.sub_minimums for each in blocks]),
        ),
        loss=_add([part.loss for part in parts]),
        plain_loss=_add([part.plain_loss for part in parts]),
        plain_rows=plain_rows,
        fallback=_join_fallbacks(parts) if plain_rows is None else explain_plain_rows(plain_rows),
    )


def _join_fallbacks(parts: Sequence[GgmlSolution]) -> str | None:
    """Tell each reason once: a rank may have one that others have not."""
    reasons = [part.fallback for part in parts if part.fallback is not None]
    return "; ".join(dict.fromkeys(reasons)) or None


def _add(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
