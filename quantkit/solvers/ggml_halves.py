"""The float16 scale and minimum of a block, or d and dmin of a super-block, by least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = float(torch.finfo(torch.float16).max)

_LEAST_DETERMINANT = 1e-6
"""Relative to its largest value; below, two unknowns cannot be told from each other in float32."""


@dataclass(frozen=True)
class Quadratic:
    """How much a change x of the scale and y of the minimum lowers a loss: the gain

        2 (slope x + slope_minimum y) - (bend x^2 + 2 cross x y + bend_minimum y^2).

    All have one shape. Where there is no minimum, what belongs to it is zero.
    """

    slope: Tensor
    bend: Tensor
    slope_minimum: Tensor
    cross: Tensor
    bend_minimum: Tensor

    def gain(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Return the gain of changes of both."""
        alone = scale * (2 * self.slope - scale * self.bend)
        alone += minimum * (2 * self.slope_minimum - minimum * self.bend_minimum)
        return alone.addcmul_(scale * minimum, self.cross, value=-2)

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the changes of both with the largest gain; none where they are not unique."""
        whole = self.bend * self.bend_minimum
        determinant = whole - self.cross.square()
        unique = determinant > _LEAST_DETERMINANT * whole
        scale = self.bend_minimum * self.slope - self.cross * self.slope_minimum
        minimum = self.bend * self.slope_minimum - self.cross * self.slope
        none = torch.zeros_like(scale)
        return (
            torch.where(unique, scale / determinant, none),
            torch.where(unique, minimum / determinant, none),
        )


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, and 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def to_half(values: Tensor) -> Tensor:
    """Return the nearest finite float16."""
    return values.nan_to_num().clamp(-_LARGEST, _LARGEST).half()


def refit_halves(
    d: Tensor, m: Tensor | None, quadratic: Quadratic, unit: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the float16 d (and m) after the best change, or as they were if none is better.

    Args:
        d, m: float16, of the shape of the quadratic. unit: what its changes are in units of.
    """
    old = d.float() / unit
    new_d = to_half((old + ratio(quadratic.slope, quadratic.bend)) * unit)
    if m is None:
        change = new_d.float() / unit - old
        return torch.where(quadratic.gain(change, torch.zeros_like(change)) > 0, new_d, d), None
    old_m = m.float() / unit
    new_m = to_half((old_m + ratio(quadratic.slope_minimum, quadratic.bend_minimum)) * unit)
    change, change_m = quadratic.best()
    both = (to_half((old + change) * unit), to_half((old_m + change_m) * unit))
    best_d, best_m, best_gain = d, m, torch.zeros_like(old)
    for option_d, option_m in (both, (new_d, m), (d, new_m)):
        gain = quadratic.gain(option_d.float() / unit - old, option_m.float() / unit - old_m)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_d, best_m = (
            torch.where(better, option_d, best_d),
            torch.where(better, option_m, best_m),
        )
    return best_d, best_m
