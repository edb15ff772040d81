"""The encoders of `simple` that search nothing, compiled by numba, an optional package.

Each is one pass over the weights; the bits of blocks [N, 32] are given beside the blocks, because
magnitudes are in the order of their bits, and the largest integer is found by vector instructions.

Importing this module raises ImportError where numba is missing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkit.numerics.ggml.kernels import compiled

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_BELOW_HALF = np.nextafter(_HALF, _ZERO)
_MAGNITUDE = np.int32(0x7FFFFFFF)

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]


@compiled
def _peaks(bits: NDArray[np.int32]) -> Floats:
    """Return the largest magnitude of blocks [N, 32]; what is not finite is larger than others."""
    peaks = np.empty(bits.shape[0], np.int32)
    for block in range(bits.shape[0]):
        peak = np.int32(0)
        for place in range(32):
            peak = max(peak, bits[block, place] & _MAGNITUDE)
        peaks[block] = peak
    return peaks.view(np.float32)


@compiled
def round_eight_bits(
    weight: Floats, bits: NDArray[np.int32], highest: int, d: Floats, codes: Codes
) -> None:
    """Find scales [N] and codes [N, 32] by the largest magnitude, halves away from zero.

    What is not finite makes the scale of its block so too.
    """
    peaks = _peaks(bits)
    for block in range(weight.shape[0]):
        scale = peaks[block] / np.float32(highest)
        d[block] = scale
        inverse = _ONE / scale
        if np.isinf(inverse):
            inverse = _ZERO
        for place in range(32):
            level = weight[block, place] * inverse
            codes[block, place] = np.int8(level + np.copysign(_BELOW_HALF, level))


@compiled
def span_magnitude(
    weight: Floats, bits: NDArray[np.int32], lowest: int, highest: int, d: Floats, codes: Codes
) -> None:
    """Find scales [N] and codes [N, 32], the first largest magnitude having the lowest code."""
    peaks = _peaks(bits)
    offset = _HALF - np.float32(lowest)
    for block in range(weight.shape[0]):
        extreme = _ZERO
        if peaks[block] > _ZERO:
            place = 0
            while abs(weight[block, place]) < peaks[block]:
                place += 1
            extreme = weight[block, place]
        scale = extreme / np.float32(lowest)
        d[block] = scale
        inverse = _ONE / scale if scale != _ZERO else _ZERO
        for place in range(32):
            if np.isinf(inverse):
                codes[block, place] = np.int8(lowest)
            else:
                code = np.int32(weight[block, place] * inverse + offset) + np.int32(lowest)
                codes[block, place] = np.int8(min(code, np.int32(highest)))


@compiled
def span_range(weight: Floats, highest: int, d: Floats, m: Floats, codes: Codes) -> None:
    """Find scales [N], minimums [N] and codes [N, 32], the extremes having the extreme codes."""
    for block in range(weight.shape[0]):
        least = most = weight[block, 0]
        for place in range(1, 32):
            value = weight[block, place]
            least = value if value < least else least
            most = value if value > most else most
        scale = (most - least) / np.float32(highest)
        d[block], m[block] = scale, least
        inverse = _ONE / scale if scale != _ZERO else _ZERO
        if np.isinf(inverse):
            inverse = _ZERO
        for place in range(32):
            code = np.int32((weight[block, place] - least) * inverse + _HALF)
            codes[block, place] = np.int8(min(code, np.int32(highest)))
