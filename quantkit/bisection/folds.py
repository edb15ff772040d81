"""What was folded between the modules of a block, even where one of them is broken.

A scale s per channel that multiplies the columns of a group of layers divides the norm, or the rows
of the linear layer, in front of them. Each module of such a fold is a witness of s: the norm by the
ratio of its weights, a layer by the factors that bring its rows or columns nearest to the
original's. A witness is believed where its s explains the *other* modules of the fold better than
no scale does: so a broken module neither passes for a fold nor hides one. A norm's s is exact, and
a gain that is barely more than nothing is proof enough: with found = W s + E, the error of W s is
below that of W where E has less than half of W (s - 1) in it, and a rounding has next to nothing.
What layers tell is an estimate, and layers with one input may err alike. Which modules these are
the family's data file says; other models are taken to have none.

Every s enters both sides of its fold, so a block with all of its modules restored computes exactly
what the original's does, whatever s is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.bisection.records import Scales
from quantkit.checkpoint.trace import InputGroup
from quantkit.records import FoldPlan
from quantkit.solvers import expand_heads

_LEAST_GAIN = 0.02
"""Of the logarithms of the others' errors: what a layer behind a norm has to explain to be
believed, and how much better than the norm."""
_LEAST_GAIN_BETWEEN = 0.003
"""The same of two layers with a fold between them, whose roundings have nothing in common."""
_LEAST_GAIN_OF_NORM = 1e-4
"""The same of a norm: beyond float32's last digits."""
_LEAST_OWN_GAIN = 0.2
"""The same of its own error, where all others are broken."""
_ROUNDED = (0.95, 1.02)
"""Factors that a rounding may give a weight: most make it a little smaller."""
_ANY = (0.0, math.inf)
_LEAST_ERROR = 1e-3
"""Where a witness's s is exact, its own error would count without end."""
_BROKEN = 0.8
"""Sine of the angle of a module that tells nothing."""
_GOOD_ENOUGH = 0.9
"""Of the best witness's gain: then the one in front is taken."""


@dataclass(frozen=True)
class _Fold:
    """A fold and the weights around it: float32, by module."""

    group: InputGroup
    plan: FoldPlan
    found: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    scales: Mapping[str, Scales]
    """What is known of earlier folds."""
    free: frozenset[str]
    """Modules whose rows may be scaled by a later fold."""


@dataclass(frozen=True)
class _Claim:
    """What a witness tells: s [I], and how much nearer each module of the fold comes under it."""

    witness: str
    scale: Tensor
    gains: Mapping[str, float]

    def sum_gains(self, names: Iterable[str]) -> float:
        return sum(self.gains[name] for name in names)


def find_scales(
    groups: Sequence[InputGroup], found: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Scales]:
    """Return module -> what was folded into it, for the modules into which something was.

    Args:
        groups: of one block, in the order of the forward.
        found: module -> weight of the artifact, float32 [O, I] or [I].
        base: the same of the original.
    """
    scales: dict[str, Scales] = {}
    for number, group in enumerate(groups):
        plan = group.fold
        if plan is None or not {plan.module, *group.linears} <= found.keys():
            continue
        later = {each.fold.module for each in groups[number + 1 :] if each.fold is not None}
        fold = _Fold(group, plan, found, base, scales, frozenset(later))
        scale = _choose(fold)
        if scale is None:
            continue
        rows = 1 / _collapse(scale, plan)
        before = scales.get(plan.module, Scales())
        scales[plan.module] = replace(before, rows=rows)
        for name in group.linears:
            scales[name] = replace(scales.get(name, Scales()), columns=scale)
    return scales


def apply_scales(tensor: Tensor, scales: Scales) -> Tensor:
    """Return an original weight [O, I] or vector [O] with what was folded into it."""
    if scales.rows is not None:
        tensor = tensor * (scales.rows.unsqueeze(1) if tensor.dim() == 2 else scales.rows)
    if scales.columns is not None and tensor.dim() == 2:
        tensor = tensor * scales.columns
    return tensor


def relative_error(found: Tensor, weight: Tensor) -> float:
    """Return ||W' - W|| / ||W||; 1 where only W is zero."""
    norm = float(torch.linalg.vector_norm(weight))
    difference = float(torch.linalg.vector_norm(found - weight))
    return difference / norm if norm else float(difference > 0)


def _choose(fold: _Fold) -> Tensor | None:
    """Return s [I] of the witness under which all come nearest; None where none is believed."""
    plain = _measure(fold, None)
    plan, judges = fold.plan, frozenset(plain)
    if plan.kind == "norm" and len(fold.group.linears) > 1:
        # Layers that agree with each other say more than a norm, which may be lost.
        judges -= {plan.module}
    best: _Claim | None = None
    for witness, scale in _witnesses(fold):
        errors = _measure(fold, scale)
        claim = _Claim(witness, scale, _compare(plain, errors))
        told, others = claim, judges - {witness}
        if plan.kind == "norm" and witness == plan.module:
            # A norm tells the size of s, too.
            strict = (_measure(fold, each, _ROUNDED) for each in (None, scale))
            told = replace(claim, gains=_compare(*strict))
        gain, needed = told.sum_gains(others), _least_gain(plan, witness) * len(others)
        if all(min(plain[name], errors[name]) >= _BROKEN for name in others):
            gain, needed = claim.gains[witness], _LEAST_OWN_GAIN
        if gain > needed and (best is None or _is_better(claim, best, judges, plan)):
            best = claim
    return None if best is None else best.scale


def _compare(plain: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
    return {name: math.log(plain[name] / errors[name]) for name in plain}


def _least_gain(plan: FoldPlan, witness: str) -> float:
    if plan.kind == "linear":
        return _LEAST_GAIN_BETWEEN
    return _LEAST_GAIN_OF_NORM if witness == plan.module else _LEAST_GAIN


def _is_better(claim: _Claim, best: _Claim, judges: frozenset[str], plan: FoldPlan) -> bool:
    """Whether a later witness is believed in place of the best so far."""
    if plan.kind == "norm" and best.witness == plan.module:
        # An estimate fits its own rounding, too: the others tell whether the norm is wrong.
        others = judges - {claim.witness}
        gained = claim.sum_gains(others) - best.sum_gains(others)
        return gained > _LEAST_GAIN * len(others)
    return _GOOD_ENOUGH * claim.sum_gains(judges) > best.sum_gains(judges)


def _witnesses(fold: _Fold) -> Iterator[tuple[str, Tensor]]:
    """Yield each module of a fold and the s [I] that it tells."""
    front = fold.plan.module
    if fold.plan.kind == "norm":
        ratio = fold.base[front] / fold.found[front]
        yield front, torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))
    else:
        rows = _fit(fold.found[front], _weigh_front(fold), 1)
        yield front, expand_heads(1 / rows, fold.plan.repeat, fold.plan.head_dim)
    for name in fold.group.linears:
        columns = _fit(fold.found[name], fold.base[name], 0)
        yield (
            name,
            expand_heads(_collapse(columns, fold.plan), fold.plan.repeat, fold.plan.head_dim),
        )


def _measure(
    fold: _Fold, scale: Tensor | None, factors: tuple[float, float] = _ANY
) -> dict[str, float]:
    """Return how far each module is from the original under s [I], within bounds.

    Any common factor goes free, which makes it the sine of the angle between them: a scale that a
    layer tells is often wrong by one, which says nothing of s. Or only those within `factors` do.
    """
    errors, front = {}, fold.plan.module
    weight = _weigh_front(fold)
    if scale is not None:
        weight = apply_scales(weight, Scales(rows=1 / _collapse(scale, fold.plan)))
    errors[front] = _measure_distance(fold.found[front], weight, factors)
    for name in fold.group.linears:
        weight = apply_scales(fold.base[name], Scales(columns=scale))
        if name in fold.free:
            weight = weight * _fit(fold.found[name], weight, 1).unsqueeze(1)
        errors[name] = _measure_distance(fold.found[name], weight, factors)
    return {name: min(max(error, _LEAST_ERROR), 1.0) for name, error in errors.items()}


def _measure_distance(found: Tensor, weight: Tensor, factors: tuple[float, float]) -> float:
    """Return ||W' - a W|| / ||W'|| for the best a within bounds; 1 where W' points elsewhere."""
    product, power = float((found * weight).sum()), float((weight * weight).sum())
    # NaN, of a damaged weight, is no direction.
    if not product > 0:
        return 1.0
    factor = min(max(product / power, factors[0]), factors[1])
    # From what is left of the weight: the cosine of two that are near has too few digits.
    left = torch.linalg.vector_norm(found - weight * factor)
    return float(left / torch.linalg.vector_norm(found))


def _weigh_front(fold: _Fold) -> Tensor:
    """The original's weight in front, with what an earlier fold did to its columns."""
    columns = fold.scales.get(fold.plan.module, Scales()).columns
    return apply_scales(fold.base[fold.plan.module], Scales(columns=columns))


def _fit(found: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Return the positive factors that bring `weight` [O, I] nearest to `found`, summed over `dim`.

    1 where there is nothing to scale.
    """
    power = (weight * weight).sum(dim)
    factor = (found * weight).sum(dim) / power
    return torch.where((power > 0) & (factor > 0), factor, torch.ones_like(factor))


def _collapse(scale: Tensor, plan: FoldPlan) -> Tensor:
    """Return s for the rows in front: the geometric mean over heads that read the same ones."""
    if plan.kind == "norm" or plan.repeat == 1:
        return scale
    return scale.log().reshape(-1, plan.repeat, plan.head_dim).mean(1).exp().reshape(-1)
