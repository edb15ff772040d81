"""The searches of K-quants over the rows of a tensor, by the kernels that numba compiles.

The functions are those of `encode_k_torch`, to the bit. They let go of Python's lock, so several
threads may encode at the same time. Importing this module raises ImportError where numba is
missing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.ggml import kernels
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.encode_k_search import Search, affine_grid, symmetric_spans
from quantkit.numerics.ggml.kernels_descent import descend_symmetric
from quantkit.numerics.ggml.packing_k import SUPER_BLOCK


def search(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Search:
    """Search scales, minimums and codes for float32 [R, I], under an importance matrix or none."""
    plain = importance is None
    x = weight.reshape(-1, kind.sub_block)
    codes = torch.empty(x.shape, dtype=torch.int8)
    scale, minimum, sums = (torch.empty(len(x)) for _ in range(3))
    cost = np.zeros(1, np.float32) if importance is None else importance.contiguous().numpy()
    # Twice the mean square, but for Q2_K.
    factor = np.float32(1 if kind.name == "Q2_K" else 2)
    mode = _mode(kind, plain)
    if kind.name == "Q3_K" and plain:
        descend_symmetric(x.numpy(), -kind.codes[0], scale.numpy(), codes.numpy())
    elif kind.has_minimum:
        grid = affine_grid(kind, plain)
        spans = np.array(grid.spans(), np.float32)
        results = [tensor.numpy() for tensor in (scale, minimum, sums, codes)]
        kernels.search_affine(
            x.numpy(), mode, cost, factor, spans, grid.top, grid.absolute, *results
        )
    else:
        top = -kind.codes[0]
        spans = np.array([top, *symmetric_spans(top)], np.float32)
        results = [tensor.numpy() for tensor in (scale, sums, codes)]
        kernels.search_symmetric(x.numpy(), mode, cost, factor, spans, top, *results)
    return Search(
        scale=_by_super_block(kind, scale),
        codes=codes.view(weight.shape),
        minimum=_by_super_block(kind, minimum) if kind.has_minimum else None,
        weights=None if plain else _by_super_block(kind, sums),
    )


def round_codes(blocks: GgmlBlocks, weight: Tensor) -> Tensor:
    """Return all codes rounded anew, int8 [R, I], those of the search where a scale is zero.

    The codes of `blocks` are overwritten.
    """
    kind = blocks.type
    x, codes = weight.reshape(-1, kind.sub_block), blocks.codes.view(-1, kind.sub_block)
    scale = blocks.scales().flatten()
    low, high = kind.codes
    found = blocks.minimums()
    minimum = torch.zeros_like(scale) if found is None else found.flatten()
    kernels.round_codes(x.numpy(), scale.numpy(), minimum.numpy(), low, high, codes.numpy())
    return blocks.codes


def _mode(kind: GgmlType, plain: bool) -> int:
    """Return what an error costs in the search of a type."""
    if kind.name == "Q6_K":
        return kernels.SQUARES if plain else kernels.GIVEN
    if not plain:
        return kernels.GIVEN_BY_SIZE
    return kernels.MAGNITUDES if kind.name == "Q2_K" else kernels.SHIFTED_MAGNITUDES


def _by_super_block(kind: GgmlType, values: Tensor) -> Tensor:
    """Bring one value for each sub-block into the order [S, N]."""
    return values.view(-1, SUPER_BLOCK // kind.sub_block).t().contiguous()
