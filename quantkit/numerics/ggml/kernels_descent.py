"""The descent of Q3_K without an importance matrix, compiled by numba: the same bits, sooner.

Importing this module raises ImportError where numba is missing.
"""

from __future__ import annotations

import numpy as np

from quantkit.numerics.ggml.kernels import Codes, Floats, compiled, nearest

_ZERO = np.float32(0)
_TINY = np.float32(1e-15)


@compiled
def descend_symmetric(weight: Floats, top: int, scale: Floats, codes: Codes) -> None:
    """Do what `encode_k_search.descend_symmetric` does, for the rows of weight [M, P].

    The last two are results: float32 [M], int8 [M, P].
    """
    for row in range(weight.shape[0]):
        extreme = _ZERO
        for place in range(weight.shape[1]):
            if abs(weight[row, place]) > abs(extreme):
                extreme = weight[row, place]
        if abs(extreme) < _TINY:
            scale[row] = _ZERO
            codes[row] = -top
            continue
        inverse = np.float32(-top) / extreme
        sum_lx = sum_l2 = _ZERO
        for place in range(weight.shape[1]):
            value = weight[row, place]
            level = np.float32(nearest(inverse * value, -top, top - 1))
            codes[row, place] = np.int8(level)
            sum_lx += value * value * value * level
            sum_l2 += value * value * level * level
        sum_lx, sum_l2 = _descend(weight[row], top, codes[row], sum_lx, sum_l2)
        scale[row] = sum_lx / sum_l2 if sum_l2 > _ZERO else _ZERO


@compiled
def _descend(
    x: Floats, top: int, codes: Codes, sum_lx: np.float32, sum_l2: np.float32
) -> tuple[np.float32, np.float32]:
    """Change codes of one block while the fit gains; return the sums that belong to them."""
    for _ in range(5):
        changed = False
        for place in range(x.size):
            value, level = x[place], np.float32(codes[place])
            weight = value * value
            rest_lx = sum_lx - weight * value * level
            if not rest_lx > _ZERO:
                continue
            rest_l2 = sum_l2 - weight * level * level
            new = np.float32(nearest(value * rest_l2 / rest_lx, -top, top - 1))
            new_lx, new_l2 = rest_lx + weight * value * new, rest_l2 + weight * new * new
            gains = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            if new != level and new_l2 > _ZERO and gains:
                codes[place] = np.int8(new)
                sum_lx, sum_l2 = new_lx, new_l2
                changed = True
        if not changed:
            break
    return sum_lx, sum_l2
