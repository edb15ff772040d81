"""Products that need only the digits that their factors have.

A float32 product whose factors are rounded to bfloat16 first is summed in float32 all the same. It
is exact for factors that are bfloat16 values already, and elsewhere good to about 1/300 of each
term. On processors with bfloat16 arithmetic it takes half the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ROUNDED = ((torch.backends.mkldnn, "bf16"), (torch.backends.cuda, "tf32"))
"""torch's settings of a backend, and what it may round float32 factors to: on CUDA TF32's 11 bits.
"""


@contextmanager
def quick_products(wanted: bool) -> Iterator[None]:
    """Let float32 matmuls round their factors while this is open; as it was before afterwards.

    Where a device cannot do it, or a matrix is small, products stay those of float32. The setting
    is the whole process's: torch knows no other.

    Args:
        wanted: False leaves everything as it is, so that a caller needs no second path.
    """
    changed = []
    try:
        for backend, precision in _ROUNDED if wanted else ():
            matmul = backend.matmul
            if hasattr(matmul, "fp32_precision"):
                changed.append((matmul, matmul.fp32_precision))
                matmul.fp32_precision = precision
        yield
    finally:
        for matmul, before in changed:
            matmul.fp32_precision = before
