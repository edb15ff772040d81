"""The factor of a second moment whose smallest pivots come first, found with its order in one pass.

Shapes: I input features. H is the second moment of a layer's input, float32 [I, I], symmetric and
positive semidefinite up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.linalg import (
    Factor,
    factor_moment,
    mean_of_diagonal,
    usable_damping,
)

_PIVOTS_AT_ONCE = 32
"""Into so many parts are the columns divided, of which the pivots are taken together."""

_KEPT_COLUMNS = 0.75
"""Share of columns below which those that are eliminated are dropped: it takes a copy."""


def factor_by_pivot(second_moment: Tensor, damping: float) -> Factor | None:
    """Factorize a damped second moment in float32, in the order of rising pivots.

    Where an elimination in float32 fails, the columns that are left come in the order of activity,
    and `factor_moment` factorizes in that order, in float64 and under more damping where it must.

    Args:
        second_moment: float32 [I, I]; neither changed nor kept.
        damping: the fraction of mean(diag H) to start with.

    Returns:
        The factor, or None where no damping suffices or H is zero.
    """
    mean = mean_of_diagonal(second_moment)
    if mean <= 0.0:
        return None
    damping = usable_damping(damping)
    found = eliminate_by_pivot(second_moment, damping * mean)
    if found.columns is None:
        return factor_moment(second_moment, found.order, damping, torch.float32)
    return Factor(found.order, found.columns.mul_(1 / math.sqrt(mean)).mT, damping)


@dataclass(frozen=True)
class Elimination:
    """order: int64 [I], of all columns. columns: float32 [I, I], row j is column j of the lower
    Cholesky factor of H in this order; None where a pivot was not positive, up to rounding.
    """

    order: Tensor
    columns: Tensor | None


def eliminate_by_pivot(second_moment: Tensor, added: float) -> Elimination:
    """Eliminate all columns, at each step those with the smallest pivots that are left.

    A pivot is what remains of a diagonal element once the columns before it are eliminated: what an
    error in this column costs if the columns before it make up for it. To take small ones first is
    the sorted decomposition of multi-antenna receivers (Wuebben et al., Electronics Letters 37(22),
    2001). A 32nd of the columns is taken at a time, which costs about as much as a factorization
    and orders nearly as well as taking one.

    Args:
        second_moment: float32 [I, I]; neither changed nor kept.
        added: to each element of the diagonal.
    """
    size, device = len(second_moment), second_moment.device
    left = torch.arange(size, device=device)
    remaining = second_moment.diagonal().clone()
    taken: list[Tensor] = []
    columns = torch.empty(size, size, device=device)
    at_once = max(8, size // _PIVOTS_AT_ONCE)
    eliminated = _start(left, at_once)
    while len(left):
        ranked = torch.argsort(remaining, stable=True)
        first, rest = ranked[:at_once], ranked[at_once:].sort().values
        own, others = eliminated.places_of(left[first]), eliminated.places_of(left[rest])
        start, stop = eliminated.count, eliminated.count + len(first)
        known = columns[:start, start:stop]
        known.copy_(eliminated.rows().index_select(1, own))
        cross = eliminated.rest_of(second_moment, left[first], known)
        pivots = cross.index_select(1, own)
        pivots.diagonal().add_(added)
        lower, info = torch.linalg.cholesky_ex(pivots)
        if int(info) or not bool(lower.diagonal().isfinite().all()):
            return Elimination(torch.cat([*taken, left[ranked]]), None)
        # Transposed: in place is for column-major matrices only.
        torch.linalg.solve_triangular(lower.mT, cross.mT, upper=True, left=False, out=cross.mT)
        columns[start:stop, :start] = 0.0
        columns[start:stop, start:stop] = lower.T
        taken.append(left[first])
        left = left[rest]
        remaining = remaining[rest] - torch.linalg.vector_norm(cross, dim=0)[others].square()
        eliminated.add(len(first), left)
    return Elimination(torch.cat(taken), columns)


@dataclass
class _Eliminated:
    """Columns that are eliminated: rows of a factor, for the columns of H that are left.

    columns: int64 [C], sorted: those of H that the rows have, a few of which are eliminated by
    now. room: float32, flat, whose beginning holds the rows [count, C]. beside: float32, flat, of
    as many rows of H as are taken at a time.
    """

    columns: Tensor
    room: Tensor
    beside: Tensor
    count: int

    def rows(self) -> Tensor:
        """Return the rows so far [count, C]."""
        return self._rows_from(0, self.count)

    def _rows_from(self, start: int, stop: int) -> Tensor:
        width = len(self.columns)
        return self.room[start * width : stop * width].view(stop - start, width)

    def places_of(self, columns: Tensor) -> Tensor:
        """Return where the rows have these columns of H."""
        return torch.searchsorted(self.columns, columns)

    def rest_of(self, second_moment: Tensor, numbers: Tensor, known: Tensor) -> Tensor:
        """Return what is left of some rows of H [P, C] once the columns so far are eliminated.

        It stands behind the rows so far, where `add` takes it for the next ones.

        Args:
            known: of `rows()` the columns of the same numbers [count, P].
        """
        whole = self.beside[: len(numbers) * len(second_moment)].view(len(numbers), -1)
        torch.index_select(second_moment, 0, numbers, out=whole)
        rest = self._rows_from(self.count, self.count + len(numbers))
        torch.index_select(whole, 1, self.columns, out=rest)
        return rest.addmm_(known.T, self.rows(), alpha=-1) if self.count else rest

    def add(self, count: int, left: Tensor) -> None:
        """Count rows in, and drop eliminated columns once they are more than a quarter."""
        self.count += count
        if len(left) < _KEPT_COLUMNS * len(self.columns):
            known, kept = self.rows(), self.places_of(left)
            self.columns = left
            narrow, step = self.rows(), max(1, self.beside.numel() // max(1, len(left)))
            # In place: a row's new place ends before the next row's old one begins.
            for start in range(0, self.count, step):
                part = known[start : start + step]
                moved = self.beside[: len(part) * len(left)].view(len(part), -1)
                narrow[start : start + step] = torch.index_select(part, 1, kept, out=moved)


def _start(columns: Tensor, at_once: int) -> _Eliminated:
    """Return rows of none of I columns, with room for all that there ever are.

    Of C columns at least `_KEPT_COLUMNS` = s are left before P = `at_once` more are added: there
    are at most (I - s C + P) C values, which is (I + P)^2 / (4 s) where it is the most.
    """
    size = len(columns)
    most = math.ceil((size + at_once) ** 2 / (4 * _KEPT_COLUMNS))
    room = torch.empty(min(size * size, most), device=columns.device)
    beside = torch.empty(at_once * size, device=columns.device)
    return _Eliminated(columns, room, beside, 0)
