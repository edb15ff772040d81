"""A search for the scales (and zero points) of groups that knows the cost of each column's error.

It minimises sum_j v_j e_j^2 within a group, for error-compensated rounding, where v_j is the
curvature that is left of column j once the columns rounded later make up for it. For rounding to
nearest, where the errors of all columns count together, see `joint_search`.

Shapes: O output features, I input features, G groups of g columns, R rows treated at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.affine import choose_group_absmax, group_weights
from quantkit.numerics.cheapest import cheapest_scales, chooses_cheapest
from quantkit.numerics.scale_candidates import FINE, Grid, Part, choose, list_candidates
from quantkit.schemes import BLOCK_SIZE, Scheme


def search_scales(
    weight: Tensor,
    scheme: Scheme,
    group_size: int | None,
    scale_dtype: torch.dtype,
    importance: Tensor,
    grid: Grid = FINE,
) -> tuple[Tensor, Tensor | None]:
    """Choose the scales that minimise sum_j v_j e_j^2 of each group.

    Args:
        weight: float32 [O, I].
        importance: float32 [I], the weights v, or [O, I] where they differ between rows.

    Returns:
        scale in `scale_dtype`, shaped as `choose_absmax` does, and zero_point int8 [O, G], or None
        for symmetric schemes.

    Raises:
        ValueError: `group_size` does not divide I.
    """

    def search(rows: Tensor, here: Tensor) -> tuple[Tensor, Tensor | None]:
        grouped = group_weights(rows, scheme, group_size)
        weights = group_weights(here, scheme, group_size)

        def loss(error: Tensor) -> Tensor:
            return error.square_().mul_(weights).sum(2)

        absmax, zero_point = choose_group_absmax(grouped, scheme, scale_dtype)
        # In units of its absmax scale no group overflows or vanishes in the objective.
        unit = absmax.float()
        part = Part(grouped / unit.unsqueeze(2), unit, None, absmax, scheme)
        candidates = list_candidates(part, absmax, zero_point, grid)
        if by_loops:
            tried = candidates.scales, candidates.zero_points
            return candidates.take(cheapest_scales(part.grouped, unit, *tried, weights, scheme))
        return candidates.take(choose(part, candidates, loss).chosen)

    by_loops = chooses_cheapest(weight, scheme)
    in_blocks = scheme.granularity == "block"
    rows = rows_at_once(weight, BLOCK_SIZE if in_blocks else 1)
    shared = importance.reshape(1, -1).expand(BLOCK_SIZE if in_blocks else 1, -1)
    return join_rows(
        [
            search(
                weight[start : start + rows],
                shared if importance.dim() == 1 else importance[start : start + rows],
            )
            for start in range(0, weight.shape[0], rows)
        ]
    )


def rows_at_once(weight: Tensor, least: int, more: int = 0) -> int:
    """Return how many rows to treat at a time: few enough for a core's cache, many for a GPU.

    It is a multiple of `least`.

    Args:
        more: weights at a time on a CPU where not all of them go through the cache at once.
    """
    elements = max(1 << 19, more) if weight.device.type == "cpu" else 1 << 25
    return max(1, elements // (weight.shape[1] * least)) * least


def join_rows(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Join scales and zero points [R, G], which all parts have or none."""
    zero_points = [zero_point for _, zero_point in parts if zero_point is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zero_points) if zero_points else None
