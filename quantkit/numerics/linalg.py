"""Factorization of second moments, and the quadratic loss that they define.

Shapes: O output features, I input features. H is the second moment of a layer's input,
float32 [I, I], symmetric and positive semidefinite up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_DAMPING = 0.01
_MOST_DAMPING = 1.0

_PIVOTS_AT_ONCE = 32
"""Into so many parts are the columns divided, of which the pivots are taken together."""

_CHUNK_ELEMENTS = 1 << 22
"""Elements of a temporary: 16 MiB of float32."""


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of a permuted and damped second moment.

    order: int64 [I], row j of `lower` belongs to column order[j] of the weight.
    lower: float64 [I, I] in column-major order, lower triangular;
    (H + damping * mean(diag H) * 1)[order, order] = mean(diag H) * lower @ lower.T.
    damping: the fraction of mean(diag H) that was added.
    """

    order: Tensor
    lower: Tensor
    damping: float


def sampling_ridge(tokens: int, size: int) -> float:
    """Return the fraction of mean(diag H) to add to an H [size, size] of so few tokens.

    The directions that few tokens leave out look free of cost, and rounding errors gather there.
    0.5 (size / tokens)^2 follows the ridge with the lowest error on held-out tokens of a trained
    Llama, which fell from 0.3 at one token a column to nothing at 30.
    """
    return min(1.0, 0.5 * (size / max(tokens, 1)) ** 2)


def order_by_pivot(second_moment: Tensor, damping: float) -> Tensor:
    """Return the order of columns, int64 [I], in which each step takes the smallest pivots left.

    A pivot is what remains of a diagonal element once the columns before it are eliminated: what an
    error in this column costs if the columns before it make up for it. To take small ones first is
    the sorted decomposition of multi-antenna receivers (Wuebben et al., Electronics Letters 37(22),
    2001). A 32nd of the columns is taken at a time, which costs about as much as a factorization
    and orders nearly as well as taking one.

    Args:
        second_moment: float32 [I, I]; neither changed nor kept.
        damping: fraction of mean(diag H) that is added to the diagonal.
    """
    added = max(damping, _LEAST_DAMPING) * second_moment.diagonal().mean()
    size = len(second_moment)
    left = torch.arange(size, device=second_moment.device)
    remaining, taken = second_moment, []
    at_once = max(8, size // _PIVOTS_AT_ONCE)
    while len(left) > at_once:
        ranked = torch.argsort(remaining.diagonal(), stable=True)
        first, rest = ranked[:at_once], ranked[at_once:].sort().values
        cross = remaining.index_select(0, first)
        pivots = cross.index_select(1, first)
        pivots.diagonal().add_(added)
        lower, info = torch.linalg.cholesky_ex(pivots)
        if int(info):
            # Not positive definite, up to rounding: what is left stays in the order of activity.
            break
        cross = torch.linalg.solve_triangular(lower, cross.index_select(1, rest), upper=False)
        smaller = torch.empty(len(rest), len(rest), device=left.device)
        _gather(remaining, rest, smaller)
        remaining = smaller.addmm_(cross.T, cross, alpha=-1)
        taken.append(left[first])
        left = left[rest]
    return torch.cat([*taken, left[torch.argsort(remaining.diagonal(), stable=True)]])


def factor_moment(second_moment: Tensor, order: Tensor, damping: float) -> Factor | None:
    """Factorize a damped second moment.

    The damping is at least 1 % of the mean diagonal, and grows tenfold, up to the mean itself, for
    as long as the matrix is not numerically positive definite. Columns that were never active
    have a zero row in H: damping decouples them from all others, so they need no case of their
    own. One float64 [I, I] is allocated, and factorized in place.

    Args:
        second_moment: float32 [I, I]; neither changed nor kept.
        order: int64 [I], the permutation.
        damping: the fraction of mean(diag H) to start with.

    Returns:
        The factor, or None where even the last damping did not suffice or H is zero.
    """
    mean = float(second_moment.diagonal().double().mean())
    if mean <= 0.0:
        return None
    size = second_moment.shape[0]
    damped = torch.empty(size, size, dtype=torch.float64, device=second_moment.device)
    damping = min(max(damping, _LEAST_DAMPING), _MOST_DAMPING)
    while True:
        _gather(second_moment, order, damped)
        damped.div_(mean).diagonal().add_(damping)
        # Transposed: LAPACK and cuSOLVER work in place on column-major matrices only.
        lower = damped.mT
        info = torch.empty((), dtype=torch.int32, device=damped.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0 and bool(lower.diagonal().isfinite().all()):
            return Factor(order, lower, damping)
        if damping >= _MOST_DAMPING:
            return None
        damping = min(10.0 * damping, _MOST_DAMPING)


def _gather(matrix: Tensor, order: Tensor, out: Tensor) -> None:
    """Write matrix[order][:, order] into `out`, a few rows at a time."""
    rows = max(1, _CHUNK_ELEMENTS // matrix.shape[0])
    for start in range(0, len(order), rows):
        part = matrix.index_select(0, order[start : start + rows])
        out[start : start + rows] = part.index_select(1, order)


def row_losses(error: Tensor, second_moment: Tensor) -> Tensor:
    """Return e H e^T of each row e of `error` [O, I], float64 [O].

    Rows are treated in chunks, so the temporaries stay small beside `error`.
    """
    rows = max(1, _CHUNK_ELEMENTS // error.shape[1])
    parts = [
        torch.sum((part @ second_moment).mul_(part), dim=1, dtype=torch.float64)
        for part in torch.split(error, rows)
    ]
    return torch.cat(parts)
