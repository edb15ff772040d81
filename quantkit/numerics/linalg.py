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

_LOSS_COLUMNS = 512
"""Width of the panels of H in a quadratic form."""

CHUNK_ELEMENTS = 1 << 22
"""Elements of a temporary: 16 MiB of float32."""


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of a permuted and damped second moment.

    order: int64 [I], row j of `lower` belongs to column order[j] of the weight.
    lower: float64 or float32 [I, I] in column-major order, lower triangular;
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


def mean_of_diagonal(second_moment: Tensor) -> float:
    """Return the unit of damping."""
    return float(second_moment.diagonal().double().mean())


def usable_damping(wanted: float) -> float:
    """Return the fraction of mean(diag H) to start with: 1 % at least, the mean at most."""
    return min(max(wanted, _LEAST_DAMPING), _MOST_DAMPING)


def factor_moment(
    second_moment: Tensor, order: Tensor, damping: float, dtype: torch.dtype = torch.float64
) -> Factor | None:
    """Factorize a damped second moment.

    The damping is at least 1 % of the mean diagonal, and grows tenfold, up to the mean itself, for
    as long as the matrix is not numerically positive definite. Columns that were never active
    have a zero row in H: damping decouples them from all others, so they need no case of their
    own. One [I, I] is allocated, and factorized in place.

    Args:
        second_moment: float32 [I, I]; neither changed nor kept.
        order: int64 [I], the permutation.
        damping: the fraction of mean(diag H) to start with.
        dtype: of the factor. A factorization in float32 is exact for an H that differs by some
            1e-7 of sqrt(H_ii H_jj) in each entry, which is far below the damping; where it fails
            all the same it is float64, under the same damping.

    Returns:
        The factor, or None where even the last damping did not suffice or H is zero.
    """
    mean = mean_of_diagonal(second_moment)
    if mean <= 0.0:
        return None
    damping = usable_damping(damping)
    while True:
        for tried in dict.fromkeys((dtype, torch.float64)):
            lower = _factorize(second_moment, order, mean, damping, tried)
            if lower is not None:
                return Factor(order, lower, damping)
        if damping >= _MOST_DAMPING:
            return None
        damping = min(10.0 * damping, _MOST_DAMPING)


def _factorize(
    second_moment: Tensor, order: Tensor, mean: float, damping: float, dtype: torch.dtype
) -> Tensor | None:
    """Return the lower triangle of H / mean + damping, permuted; None if it has none."""
    size = len(order)
    damped = torch.empty(size, size, dtype=dtype, device=second_moment.device)
    _gather(second_moment, order, damped)
    damped.div_(mean).diagonal().add_(damping)
    # Transposed: LAPACK and cuSOLVER work in place on column-major matrices only.
    lower = damped.mT
    info = torch.empty((), dtype=torch.int32, device=damped.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower if int(info) == 0 and bool(lower.diagonal().isfinite().all()) else None


def _gather(matrix: Tensor, order: Tensor, out: Tensor) -> None:
    """Write matrix[order][:, order] into `out`, a few rows at a time."""
    rows = max(1, CHUNK_ELEMENTS // matrix.shape[0])
    for start in range(0, len(order), rows):
        part = matrix.index_select(0, order[start : start + rows])
        out[start : start + rows] = part.index_select(1, order)


def row_losses(error: Tensor, second_moment: Tensor) -> Tensor:
    """Return e H e^T of each row e of `error` [O, I], float64 [O].

    What lies below the diagonal of H counts twice instead of what lies above. Rows are treated in
    chunks, so the temporaries stay small beside `error`.
    """
    rows = max(1, CHUNK_ELEMENTS // error.shape[1])
    losses = torch.zeros(len(error), dtype=torch.float64, device=error.device)
    # One room for all panels: each is smaller than the last, and would leave a hole of its own.
    room = second_moment.new_empty(error.shape[1] * min(_LOSS_COLUMNS, error.shape[1]))
    for start in range(0, error.shape[1], _LOSS_COLUMNS):
        source = second_moment[start:, start : start + _LOSS_COLUMNS]
        panel = room[: source.numel()].view(source.shape).copy_(source)
        panel[: panel.shape[1]] *= 0.5
        for first in range(0, len(error), rows):
            part = error[first : first + rows]
            product = part[:, start:] @ panel
            product.mul_(part[:, start : start + _LOSS_COLUMNS])
            # No less exact than the products; summed in float64 it takes a tenth longer in all.
            losses[first : first + rows].add_(product.sum(dim=1), alpha=2)
    return losses
