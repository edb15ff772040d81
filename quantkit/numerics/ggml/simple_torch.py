"""What `simple` does in torch, on any device, for blocks [N, 32]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.ggml import encode_k_search
from quantkit.numerics.ggml.encode_k_search import (
    AffineGrid,
    divide_by_number,
    divide_number,
    largest_magnitude,
)

_BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))
"""Added to a magnitude before it is cut off, it rounds halves away from zero, and no other number
of a code's size wrongly: one half would lift the number just below one half to 1."""


def round_eight_bits(kind: GgmlType, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8 [N, 32], halves rounded away from zero, and scales float32 [N]."""
    d = divide_by_number(x.abs().amax(1), kind.codes[1])
    scaled = x * _usable_inverse(d).unsqueeze(1)
    scaled += torch.copysign(torch.full((), _BELOW_HALF, device=x.device), scaled)
    return scaled.to(torch.int8), d


def span_magnitude(kind: GgmlType, x: Tensor) -> tuple[Tensor, Tensor]:
    """Give the first weight of largest magnitude the lowest code.

    Returns:
        Codes int8 [N, 32], and scales float32 [N].
    """
    lowest, highest = kind.codes
    d = divide_by_number(largest_magnitude(x.T.contiguous()), lowest)
    # Shifted codes are cut off, as in ggml; the sum is rounded to float32 before.
    shifted = (x * _usable_inverse(d).unsqueeze(1) + (0.5 - lowest)).to(torch.int8)
    codes = shifted.clamp_(max=highest - lowest).add_(lowest)
    # What ggml scales by infinity becomes byte 0.
    unusable = (d != 0) & divide_number(1.0, d).isinf()
    return codes.masked_fill_(unusable.unsqueeze(1), lowest), d


def span_range(kind: GgmlType, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the extremes the extreme codes.

    Returns:
        Codes int8 [N, 32], scales and minimums float32 [N].
    """
    least, most = _extremes(x.T.contiguous())
    d = divide_by_number(most - least, kind.codes[1])
    codes = (x - least.unsqueeze(1)) * _usable_inverse(d).unsqueeze(1) + 0.5
    return codes.to(torch.int8).clamp_(max=kind.codes[1]), d, least


def search_affine(x: Tensor, costs: Tensor, grid: AffineGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Search under costs of the same shape.

    Returns:
        Scales and minimums, the latter to be subtracted, float32 [N]; codes int8 [N, 32].
    """
    d, m, codes = encode_k_search.search_affine(x.T.contiguous(), costs.T.contiguous(), grid)
    return d, m, codes.to(torch.int8).T.contiguous()


def search_symmetric(x: Tensor, costs: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Search under costs of the same shape.

    Returns:
        Scales float32 [N], and codes int8 [N, 32] from -top to top - 1.
    """
    d, codes = encode_k_search.search_symmetric(x.T.contiguous(), costs.T.contiguous(), top)
    return d, codes.to(torch.int8).T.contiguous()


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest of [32, N].

    The first of zeros of both signs counts, and gives the minimum its sign.
    """
    least = most = x[0]
    for place in x[1:]:
        least = torch.where(place < least, place, least)
        most = torch.where(place > most, place, most)
    return least, most


def _usable_inverse(d: Tensor) -> Tensor:
    """Return 1 / d; 0 where d is 0, or so small that the result is infinite."""
    inverse = divide_number(1.0, d)
    return torch.where(inverse.isinf(), 0.0, inverse)
