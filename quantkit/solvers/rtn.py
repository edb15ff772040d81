"""Round to nearest with absmax scales: needs no calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, quantize
from quantkit.schemes import Scheme
from quantkit.solvers.rounding import Rounding


def round_plainly(
    weight: Tensor,
    scheme: Scheme,
    group_size: int | None,
    scale_dtype: torch.dtype,
) -> Rounding:
    """Round every weight of float32 [O, I] to the nearest code.

    Raises:
        ValueError: `group_size` does not divide I.
    """
    scale, zero_point = choose_absmax(weight, scheme, group_size, scale_dtype)
    codes = quantize(weight, scale, zero_point, scheme)
    return Rounding(codes, scale, zero_point)
