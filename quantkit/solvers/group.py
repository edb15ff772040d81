"""Solve the linear layers of a group, which share an input, and measure the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.numerics.affine import row_units
from quantkit.numerics.linalg import row_losses
from quantkit.numerics.precision import quick_products
from quantkit.ranks import ALONE, Ranks, from_first
from quantkit.records import LayerStats, LinearPlan, QuantizedLayer
from quantkit.schemes import BLOCK_SIZE, Rounder
from quantkit.solvers.coupled import round_coupled
from quantkit.solvers.custom import round_by
from quantkit.solvers.gptq import round_compensated
from quantkit.solvers.one_scale import round_under_one_scale
from quantkit.solvers.rounding import Rounding, alike
from quantkit.solvers.rtn import round_plainly
from quantkit.solvers.search import round_searched
from quantkit.solvers.spreading import spread_rows

CALIBRATED_ROUNDERS: Mapping[Rounder, Callable[..., Rounding]] = MappingProxyType(
    {"search": round_searched, "gptq": round_compensated}
)
"""Rounder -> its function; each takes statistics and effort. `rtn` takes neither."""


_ELEMENTS_AT_ONCE = 1 << 22
"""Of a temporary while errors of weights are measured: 16 MiB of float32."""


@dataclass(frozen=True)
class Solution:
    """One solved layer.

    damping: fraction of mean(diag H) that was added before the factorization, or None.
    loss: tr(E H E^T) of the layer, and plain_loss what plain rounding of the same weight would
    have; None where the method takes no second moment.
    fallback: why the layer, or some of its rows, got plain rounding, or None.
    """

    layer: QuantizedLayer
    damping: float | None
    fallback: str | None
    loss: float | None = None
    plain_loss: float | None = None


def solve_group(
    weights: Sequence[Tensor],
    stats: LayerStats | None,
    linears: Sequence[LinearPlan],
    scale_dtype: torch.dtype,
    fishers: Mapping[str, Tensor] = MappingProxyType({}),
    ranks: Ranks = ALONE,
) -> tuple[Solution, ...]:
    """Quantize linear layers that share an input; those with equal settings as one matrix.

    Args:
        weights: float32 [O_i, I], one for each of `linears`.
        stats: of the shared input, or None where every method is data-free.
        linears: quantized ones only.
        scale_dtype: in which scales are stored.
        fishers: layer name -> float32 [O_i, B], see `solvers/coupled.py`. Layers that gptq rounds
            and that have one are rounded for the divergence of the whole model.
        ranks: that call this together, with the same arguments, and share the rows.

    Returns:
        One solution for each of `linears`, on the device of the weights.

    Raises:
        CalibrationError: the statistics are not finite.
        ValueError: a method needs statistics and there are none, or a layer is not quantized.
    """
    if stats is not None and not bool(stats.second_moment.diagonal().isfinite().all()):
        raise CalibrationError(
            f"the input of {linears[0].name} is not finite on the calibration tokens: "
            "the model overflows on them, so check the checkpoint and its dtype"
        )
    solutions: dict[int, Solution] = {}
    for members in alike(linears):
        parts = [weights[index] for index in members]
        # A layer on its own is not copied.
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        known = [
            fishers[linears[index].name] for index in members if linears[index].name in fishers
        ]
        rounding = _round(joined, stats, linears[members[0]], scale_dtype, known, ranks)
        start = 0
        for index, part in zip(members, parts, strict=True):
            rows = slice(start, start + len(part))
            solutions[index] = _take(rounding, rows, linears[index])
            start += len(part)
    return tuple(solutions[index] for index in range(len(linears)))


def _round(
    weight: Tensor,
    stats: LayerStats | None,
    linear: LinearPlan,
    scale_dtype: torch.dtype,
    fishers: Sequence[Tensor],
    ranks: Ranks,
) -> Rounding:
    """Round the rows of layers that are all to be treated like `linear`."""
    if not linear.quantized:
        raise ValueError(f"{linear.name}: scheme {linear.scheme.name} has no codes")
    rounder = linear.method.rounder
    if linear.one_scale:
        # The scale depends on all rows.
        return from_first(
            ranks,
            lambda: round_under_one_scale(
                weight, linear.scheme, rounder, scale_dtype, stats, linear.effort
            ),
        )
    if rounder == "rtn":
        return round_plainly(weight, linear.scheme, linear.group_size, scale_dtype)
    solver = linear.method.solver
    if solver is not None and (stats is None or stats.tokens or not solver.needs_statistics):
        # Nobody knows whether its rows are independent: one process does it.
        own = solver
        return from_first(ranks, lambda: round_by(own, weight, stats, linear, scale_dtype))
    if stats is None:
        raise ValueError(f"{linear.name}: method {linear.method.name} needs statistics")
    if stats.tokens == 0:
        plain = round_plainly(weight, linear.scheme, linear.group_size, scale_dtype)
        return dataclasses.replace(plain, fallback="rtn: no calibration token reached the layer")
    if rounder == "gptq" and fishers and linear.scheme.granularity != "block":
        # Rows make up for each other here: one process does it, and the others take its codes.
        return from_first(
            ranks,
            lambda: round_coupled(
                weight, linear.scheme, linear.group_size, scale_dtype, stats, linear.effort, fishers
            ),
        )
    round_calibrated = CALIBRATED_ROUNDERS[rounder]
    return spread_rows(
        ranks,
        weight,
        linear.scheme,
        lambda rows: round_calibrated(
            rows, linear.scheme, linear.group_size, scale_dtype, stats, linear.effort
        ),
    )


def _take(rounding: Rounding, rows: slice, linear: LinearPlan) -> Solution:
    """Return the solution of one layer, copied so that it does not keep the others alive."""
    fallback = rounding.fallback
    if rounding.plain_rows is not None:
        plain = rounding.plain_rows[rows]
        if bool(plain.any()):
            count = int(plain.sum())
            fallback = f"rtn: {count} of {len(plain)} rows, where the method was not better"
    zero_point = rounding.zero_point
    scales = rows
    if linear.scheme.granularity == "block":
        scales = slice(rows.start // BLOCK_SIZE, -(-rows.stop // BLOCK_SIZE))
    layer = QuantizedLayer(
        name=linear.name,
        scheme=linear.scheme,
        group_size=linear.group_size,
        codes=rounding.codes[rows].clone(),
        scale=rounding.scale[scales].clone(),
        zero_point=None if zero_point is None else zero_point[rows].clone(),
    )
    return Solution(
        layer,
        rounding.damping,
        fallback,
        loss=None if rounding.losses is None else float(rounding.losses[rows].sum()),
        plain_loss=None
        if rounding.plain_losses is None
        else float(rounding.plain_losses[rows].sum()),
    )


def measure_weights(weight: Tensor, dequantized: Tensor) -> float:
    """Return |E|^2 / |W|^2 of a solved layer; nothing to nothing is 0.

    Args:
        weight: float32 [O, I], what was solved; dequantized: float32 [O, I], what came out.
    """
    # Exact, and no square overflows: the ratio does not depend on the unit.
    largest = torch.stack(torch.aminmax(weight)).abs().amax()
    unit = row_units(largest.reshape(1, 1))
    part = whole = 0.0
    rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    for original, decoded in zip(weight.split(rows), dequantized.split(rows), strict=True):
        original = original / unit
        error = (decoded / unit).sub_(original)
        part += float(torch.sum(error.square_(), dtype=torch.float64))
        whole += float(torch.sum(original.square_(), dtype=torch.float64))
    return part / whole if whole > 0 else float(part > 0)


def output_energy(weight: Tensor, stats: LayerStats) -> float:
    """Return tr(W H W^T) of float32 [O, I], the squared output that losses are relative to.

    A fold does not change it, since W * s meets H / (s s^T).
    """
    with quick_products(stats.bfloat16):
        return float(row_losses(weight, stats.second_moment).sum())
