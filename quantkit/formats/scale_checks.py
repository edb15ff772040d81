"""Are the scales of a layer those of its codes?

A layer under another's scales, or under its own in another order, is near enough to the base's to
pass for a coarse rounding. But the errors of a rounding are of either sign within a few weights;
those of a wrong scale are of one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 32
"""Weights of a row, side by side, that have one factor here."""
_LEAST_SPREAD = 0.06
"""Clipped groups are a few percent too small."""
_TIMES_USUAL = 3.0
_LARGEST_LEVERAGE = 0.5
"""Share of one weight in the square of a piece, at the most."""
_STEP = 1 << 24
"""Weights that are looked at together."""
_LEAST_PIECES, _LEAST_SHARE = 16, 0.05
"""Pieces of a layer, and their share, without which nothing is said."""
LARGEST_BIAS = 0.5
"""Mean of a layer's errors, relative to their root mean square: rounding to the nearest code has
almost none, cutting off or a zero point that is off by one has 0.87 to 1."""
_LEAST_ROWS = 0.1
"""Standard deviation of the logarithms of rows' factors from which on they are no noise."""
_ALIKE = 0.25
"""Median distance of logarithms, relative to their own deviation, of what undoes another."""


@dataclass(frozen=True, eq=False)
class FittedScales:
    """What brings a base's weight [O, I] nearest to a layer: float32 rows [O], columns [I]."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Spread:
    """How the factor on a short piece of a row varies, as `measure_spread` has it."""

    found: float = 0.0
    usual: float = 0.0
    """What errors of either sign, of the size that these pieces have, give."""

    @property
    def is_wrong(self) -> bool:
        """Whether no rounding gives it."""
        return self.found > max(_LEAST_SPREAD, _TIMES_USUAL * self.usual)


def measure_spread(found: Tensor, weight: Tensor) -> Spread:
    """Measure how the factor that brings a piece of a row of `found` nearest to `weight` varies.

    Both numbers are medians over pieces, so that a few odd ones do not count. `found` is the
    deviation of the factors' logarithms; `usual` is the standard error of a factor, from what it
    leaves of the piece (MacKinnon and White's HC3, 1985, which divides what is left of a weight by
    1 less its leverage: a weight that makes up most of a piece pulls the factor to itself). A piece
    that is little more than one weight has a factor that tells of its rounding alone, and is
    left out.

    Args:
        found, weight: float32 [O, I]. Columns behind the last whole piece are left out.
    """
    count = len(found) * (found.shape[1] // PIECE)
    # A whole head in float32, several times over, may be more than the memory.
    step = max(1, _STEP // max(1, found.shape[1]))
    fits = [_fit_pieces(*pair) for pair in zip(found.split(step), weight.split(step), strict=True)]
    factors, errors = (torch.cat(part) for part in zip(*fits, strict=True))
    if len(factors) < max(_LEAST_PIECES, _LEAST_SHARE * count):
        return Spread()
    logarithms = factors.log()
    deviation = 1.4826 * float((logarithms - logarithms.median()).abs().median())
    return Spread(deviation, float(errors.median()))


def _fit_pieces(found: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor of each piece that has one, and its relative standard error, float32 [n].

    Args:
        found, weight: float32 [O, I].
    """
    whole = found.shape[1] // PIECE * PIECE
    pieces, expected = (each[:, :whole].reshape(-1, PIECE) for each in (found, weight))
    power, product = (pieces * pieces).sum(1), (pieces * expected).sum(1)
    largest = pieces.abs().amax(1).square()
    sound = (power > 0) & (product > 0) & (largest <= _LARGEST_LEVERAGE * power)
    pieces, expected, power = pieces[sound], expected[sound], power[sound]
    factors = product[sound] / power
    left = expected - pieces * factors[:, None]
    left /= 1 - pieces.square() / power[:, None]
    return factors, (left * pieces).square().sum(1).sqrt() / (power * factors)


def measure_bias(found: Tensor, weight: Tensor) -> float:
    """Return the mean of the errors of a layer, relative to their root mean square; 0 for none.

    Args:
        found, weight: float32 [O, I].
    """
    errors = found - weight
    size = float(errors.square().mean().sqrt())
    return abs(float(errors.mean())) / size if size else 0.0


def find_lonely_rows(layers: Mapping[str, FittedScales], scaled: Collection[str]) -> Iterator[str]:
    """Yield a problem of each layer whose rows are scaled where no other layer takes that back.

    What is folded between two layers is in the rows of the one and, inverted, in the columns of
    the other, maybe several times over (heads that share keys); between queries and keys it is in
    the rows of both.

    Args:
        layers: of one block, those that were fitted.
        scaled: those of them that the fit explains.
    """
    inverse = {
        name: [-_take_logarithms(part) for part in (layer.columns, layer.rows)]
        for name, layer in layers.items()
    }
    for name in scaled:
        rows = _take_logarithms(layers[name].rows)
        spread = float(rows.std()) if len(rows) > 1 else 0.0
        if spread <= _LEAST_ROWS:
            continue
        others = [part for other, parts in inverse.items() if other != name for part in parts]
        if not any(_is_alike(rows, other, spread) for other in others):
            yield (
                f"the rows of layer {name} have other scales than the base's (they vary by "
                f"{100 * spread:.0f} %), and no layer of its block takes that back"
            )


def _take_logarithms(factors: Tensor) -> Tensor:
    return factors.double().abs().clamp(min=1e-12).log()


def _is_alike(rows: Tensor, other: Tensor, spread: float) -> bool:
    """Whether two are the same but for a common factor, the shorter maybe with heads repeated."""
    short, long = sorted((rows, other), key=len)
    if len(long) % len(short):
        return False
    times = len(long) // len(short)
    sizes = [size for size in range(1, len(short) + 1) if len(short) % size == 0]
    for size in sizes if times > 1 else sizes[:1]:
        repeated = short.reshape(-1, size).repeat_interleave(times, 0).flatten()
        ratio = repeated - long
        # By medians: columns that were rounded to nothing have no factor.
        if float((ratio - ratio.median()).abs().median()) <= _ALIKE * spread:
            return True
    return False
