"""Rows of an embedding or an output layer that are not the base's, where the others are.

Each row is one token's, and a text without that token tells nothing of it: a lost end of sequence
does not show in a few windows, nor in the norm of the whole table.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_COSINE = 0.5
"""Of a row that can be a rounding: an error of 1.7 times its norm leaves as much."""
_MOST_GROWTH = 2.0
"""Factor on a row's norm beside that of the others: no rounding of a whole row does that."""
_USUAL_COSINE = 0.9
"""Median of the rows from which on they are told apart: below, the whole table is another."""
_TINY = 1e-3
"""Of the median norm: rows of tokens that were never trained, which rounding may well lose."""
_FEWEST = 8
"""Rows from which on there is something usual."""


def measure_rows(found: Tensor, weight: Tensor) -> Tensor:
    """Return cosine, and both norms, of each row of two matrices [R, I]; float64 [R, 3]."""
    found, weight = found.double(), weight.double()
    cosine = torch.nn.functional.cosine_similarity(found, weight, dim=1)
    return torch.stack([cosine, found.norm(dim=1), weight.norm(dim=1)], dim=1)


def find_wrong_rows(name: str, rows: Tensor) -> str | None:
    """Say which rows of a table are not a rounding of the base's, where most are.

    Args:
        name: of the tensor.
        rows: what `measure_rows` gave, float64 [R, 3].
    """
    cosine, found, norm = rows.unbind(1)
    trained = norm > _TINY * norm.median()
    if int(trained.sum()) < _FEWEST or float(cosine[trained].median()) < _USUAL_COSINE:
        return None
    growth = found / norm.clamp(min=torch.finfo(torch.float64).tiny)
    growth = growth / growth[trained].median()
    far = (growth > _MOST_GROWTH) | (growth < 1 / _MOST_GROWTH) | (cosine < _LEAST_COSINE)
    wrong = torch.nonzero(trained & far).flatten().tolist()
    if not wrong:
        return None
    first = wrong[0]
    return (
        f"{len(wrong)} of the {len(rows)} rows of {name} are not the base's, while the others are: "
        f"for instance row {first} (cosine {float(cosine[first]):.2f}, "
        f"{float(growth[first]):.3g} times as long)"
    )
