"""The functions of `simple_torch` by kernels that numba compiles: the same bits, sooner.

The kernels let go of Python's lock, so several threads may encode at the same time. Importing this
module raises ImportError where numba is missing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.ggml import kernels, kernels_simple
from quantkit.numerics.ggml.encode_k_search import AffineGrid, symmetric_spans
from quantkit.numerics.ggml.row_threads import map_in_threads

_UNUSED = np.float32(0)
_BEYOND_FLOAT16 = 65520.0
"""The smallest number that is rounded to infinity."""


def encode_eight_bits(weight: Tensor) -> Tensor | None:
    """Return the bytes of float32 [R, I] in Q8_0, uint8 [R, row bytes]; None if a scale overflows.

    It is bound by memory: that is why there are no blocks between weights and bytes.
    """
    kind = GGML_TYPES["Q8_0"]
    x = weight.contiguous().reshape(-1, kind.block).numpy()
    data = np.empty((len(x), kind.block_bytes), np.uint8)
    d = np.empty(len(x), np.float32)
    codes, scales = data[:, 2:].view(np.int8), data[:, :2]

    def run(part: slice) -> None:
        bits = x[part].view(np.int32)
        kernels_simple.round_eight_bits(x[part], bits, kind.codes[1], d[part], codes[part])
        # False for NaN too.
        if d[part].max() < _BEYOND_FLOAT16:
            scales[part] = d[part].astype(np.float16)[:, None].view(np.uint8)

    share = -(-len(x) // torch.get_num_threads())
    map_in_threads(run, [slice(start, start + share) for start in range(0, len(x), share)])
    if not d.max() < _BEYOND_FLOAT16:
        return None
    return torch.from_numpy(data.reshape(len(weight), -1))


def span_magnitude(kind: GgmlType, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8 [N, 32] and scales float32 [N]."""
    codes, d = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    bits = x.view(torch.int32).numpy()
    kernels_simple.span_magnitude(x.numpy(), bits, *kind.codes, d.numpy(), codes.numpy())
    return codes, d


def span_range(kind: GgmlType, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes int8 [N, 32], scales and minimums float32 [N]."""
    codes, d, m = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x)), torch.empty(len(x))
    kernels_simple.span_range(x.numpy(), kind.codes[1], d.numpy(), m.numpy(), codes.numpy())
    return codes, d, m


def search_affine(x: Tensor, costs: Tensor, grid: AffineGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Search for blocks [N, 32] under costs of the same shape.

    Returns:
        Scale and minimum, the latter to be subtracted, float32 [N]; codes int8 [N, 32].
    """
    scale, minimum, sums = (torch.empty(len(x)) for _ in range(3))
    codes = torch.empty(x.shape, dtype=torch.int8)
    spans = np.array(grid.spans(), np.float32)
    results = [result.numpy() for result in (scale, minimum, sums, codes)]
    given, flat = kernels.GIVEN, costs.flatten().numpy()
    kernels.search_affine(x.numpy(), given, flat, _UNUSED, spans, grid.top, grid.absolute, *results)
    return scale, minimum, codes


def search_symmetric(x: Tensor, costs: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Search for blocks [N, 32] under costs of the same shape.

    Returns:
        Scale float32 [N], and codes int8 [N, 32] from -top to top - 1.
    """
    scale, sums = torch.empty(len(x)), torch.empty(len(x))
    codes = torch.empty(x.shape, dtype=torch.int8)
    spans = np.array([top, *symmetric_spans(top)], np.float32)
    results = [result.numpy() for result in (scale, sums, codes)]
    kernels.search_symmetric(
        x.numpy(), kernels.GIVEN, costs.flatten().numpy(), _UNUSED, spans, top, *results
    )
    return scale, codes
