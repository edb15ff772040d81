"""Schemes or types for the layers that `auto` leaves open: measure, then choose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from quantkit.allocation.choose import Option, choose
from quantkit.allocation.sensitivity import measure_costs
from quantkit.allocation.stored import load_allocation, store_allocation
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RecipeError
from quantkit.records import (
    AllocatedUnit,
    Allocation,
    OpenChoice,
    Plan,
    Progress,
    TokenWindows,
    UnitCost,
)

__all__ = ["allocate", "choose_schemes", "load_allocation", "store_allocation"]

_FINEST = 1 << 40
"""Steps into which `max_kl` is divided, so that sums of divergences are exact."""


def allocate(
    checkpoint: Checkpoint,
    plan: Plan,
    choice: OpenChoice,
    windows: TokenWindows,
    *,
    device: torch.device,
    tell: Progress,
) -> Allocation:
    """Measure every candidate of every unit and choose.

    Args:
        plan: of the job, with the choice still open.
        windows: the calibration windows.

    Raises:
        CheckpointError: the model cannot be measured, or overflows on the data.
        RecipeError: `max_kl` cannot be reached, or the model overflows with a candidate.
    """
    costs = measure_costs(checkpoint, plan, choice, windows, device=device, tell=tell)
    tokens = int((windows.weights[: choice.windows, : choice.window_tokens] > 0).sum())
    return choose_schemes(choice, costs, plan.parameters, tokens)


def choose_schemes(
    choice: OpenChoice, costs: Sequence[Sequence[float]], parameters: int, tokens: int
) -> Allocation:
    """Choose a candidate for each unit.

    With `target_bits` the sum of divergences is made small within the bits; with `max_kl` the
    bytes are made few within the sum of divergences.

    Args:
        costs: divergence of each candidate of each unit.
        parameters: weights of the checkpoint.
        tokens: on which the divergences were taken.

    Raises:
        RecipeError: `max_kl` cannot be reached, or the model overflows with a candidate.
    """
    rows = [
        tuple(
            UnitCost(candidate.scheme, cost, candidate.size_bytes)
            for candidate, cost in zip(unit.candidates, row, strict=True)
        )
        for unit, row in zip(choice.units, costs, strict=True)
    ]
    layers = [tuple(linear.name for linear in unit.candidates[0].linears) for unit in choice.units]
    for names, row in zip(layers, rows, strict=True):
        for cost in row:
            if not math.isfinite(cost.kl):
                raise RecipeError(
                    f"the model overflows when {names[0]} is quantized to {cost.scheme}: take it "
                    f"out of the candidates, or the layer out of the choice by an override"
                )
    chosen = [row[index] for row, index in zip(rows, _pick(choice, rows, parameters), strict=True)]
    size = choice.fixed_bytes + sum(cost.size_bytes for cost in chosen)
    return Allocation(
        units=tuple(
            AllocatedUnit(names, row, cost.scheme)
            for names, row, cost in zip(layers, rows, chosen, strict=True)
        ),
        tokens=tokens,
        target_bits=choice.target_bits,
        max_kl=choice.max_kl,
        predicted_kl=math.fsum(cost.kl for cost in chosen),
        predicted_bits=8 * size / parameters,
    )


def _pick(
    choice: OpenChoice, rows: Sequence[Sequence[UnitCost]], parameters: int
) -> tuple[int, ...]:
    """Return the index of the chosen candidate of each unit."""
    if choice.target_bits is not None:
        # A target that is met to the byte must not be missed by rounding.
        limit = math.floor(choice.target_bits * parameters / 8 + 1e-6) - choice.fixed_bytes
        return choose([[Option(cost.kl, cost.size_bytes) for cost in row] for row in rows], limit)
    target = choice.max_kl or 0.0
    options = [[Option(cost.size_bytes, _steps(cost.kl, target)) for cost in row] for row in rows]
    if sum(min(option.weight for option in row) for row in options) > _FINEST:
        least = math.fsum(min(cost.kl for cost in row) for row in rows)
        raise RecipeError(
            f"quantize.max_kl {target:g} cannot be reached: the most accurate of "
            f"quantize.candidates add up to {least:.3g} nats per token; raise max_kl, or add none "
            f"or a scheme with more bits to the candidates"
        )
    return choose(options, _FINEST)


def _steps(kl: float, target: float) -> int:
    """A divergence as a whole number of steps, rounded up; far beyond the target it is cut off."""
    return math.ceil(min(kl / target, 4.0) * _FINEST)
