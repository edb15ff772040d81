"""llama.cpp's encoders of the types with blocks of 32 weights and float16 scales.

Without an importance matrix the scale follows from the extremes of a block; with one it is searched
(ggml-quants.c of llama.cpp). The same bytes ask for the same float32 operations in the same order;
encode_k_search.py says more.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.ggml import simple_torch
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.encode_k_search import affine_grid, divide_by_number, square_root

SIMPLE_KINDS = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))
"""Names of the types that this module encodes."""


def encode_simple(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> GgmlBlocks:
    """Choose codes and scales of finite float32 [R, I]; importance: float32 [I] or None.

    Raises:
        ValueError: the type is not of this module.
    """
    if kind.name not in SIMPLE_KINDS:
        raise ValueError(f"{kind.name} is none of {', '.join(sorted(SIMPLE_KINDS))}")
    x, m = weight.contiguous().view(-1, kind.block), None
    way = _compiled(weight.device) or simple_torch
    if kind.name == "Q8_0":
        codes, d = simple_torch.round_eight_bits(kind, x)
    elif importance is not None:
        costs = weigh(weight, importance, _mean_squares(weight)).view_as(x)
        if kind.has_minimum:
            d, minus_m, codes = way.search_affine(x, costs, affine_grid(kind, plain=False))
            m = -minus_m
        else:
            d, codes = way.search_symmetric(x, costs, kind.codes[1] + 1)
    elif kind.has_minimum:
        codes, d, m = way.span_range(kind, x)
    else:
        codes, d = way.span_magnitude(kind, x)
    rows = len(weight)
    return GgmlBlocks(
        kind,
        codes.view(weight.shape),
        d.half().view(rows, -1),
        None if m is None else m.half().view(rows, -1),
    )


def encode_eight_bits_at_once(weight: Tensor) -> Tensor | None:
    """Return the bytes of float32 [R, I] in Q8_0, uint8 [R, row bytes].

    It takes numba and weights on a processor; None without, or if a weight is not finite or a scale
    too large for float16.
    """
    compiled = _compiled(weight.device)
    return None if compiled is None else compiled.encode_eight_bits(weight)


def weigh(weight: Tensor, importance: Tensor, mean_squares: Tensor) -> Tensor:
    """Return what a squared error of each weight costs under an importance matrix, [R, I]."""
    return (importance * square_root(mean_squares + weight * weight)).contiguous()


def _compiled(device: torch.device) -> ModuleType | None:
    """Return the compiled encoders, for a processor and where numba is installed."""
    if device.type != "cpu":
        return None
    try:
        import quantkit.numerics.ggml.simple_compiled as compiled
    except ImportError:
        return None
    return compiled


def _mean_squares(weight: Tensor) -> Tensor:
    """Return the mean square [R, 1] of rows, added up column by column in float32."""
    squares = (weight * weight).cpu().numpy()
    # A running sum, because numpy too adds plain sums in parts.
    totals = np.add.accumulate(squares, axis=1, dtype=np.float32)[:, -1:].copy()
    return divide_by_number(torch.from_numpy(totals).to(weight.device), weight.shape[1])
