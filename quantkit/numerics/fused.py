"""Arithmetic that the loops compiled by numba share, in float32 as vector instructions do it.

Importing this module raises ImportError where numba is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from quantkit.numerics.ggml.kernels import compiled

Floats = NDArray[np.float32]

ROUNDING = np.float32(12582912)
"""1.5 * 2^23: a float32 below 2^22 that it is added to is rounded to an integer, ties to even."""


def _generate_fused(_: Any, left: Any, right: Any, added: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


fused = cast(Callable[[np.float32, np.float32, np.float32], np.float32], intrinsic(_generate_fused))
"""Return left * right + added, rounded once."""


@compiled
def hold_and_round(value: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """Hold a value in a range of integers and round it to the nearest, ties to even."""
    # Written so that a value that is not a number stays so.
    held = low if value < low else value
    held = high if held > high else held
    return (held + ROUNDING) - ROUNDING
