"""Products of bfloat16 matrices that are summed in float32, on a processor.

torch multiplies bfloat16 as fast as the processor can and rounds what comes out to bfloat16, or
sums in float32 what it has widened before, at less than half the speed. So where the processor has
AVX512-BF16, numba compiles a product that keeps its float32 sums, if it is installed. Processors
with AMX are left to torch, whose products use it.

Shapes: T tokens, n and m features. Packed rows are int32 [P, ceil(T/2), 16], P a multiple of 3:
panels of 16 features, in which a number has the values of a feature for two tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from quantkit.numerics.memory import view_numbers
from quantkit.numerics.threads import share_out

_PACKED_A_THREAD = 1 << 18
_PRODUCTS_A_THREAD = 1 << 25
"""So few numbers, or products of two of them, take about as long as waking a thread."""

_PARTS_A_THREAD = 4


def sums_products(device: torch.device) -> bool:
    """Say whether bfloat16 rows on a device can be packed and multiplied."""
    if device.type != "cpu" or find_spec("numba") is None:
        return False
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    return features.get("avx512bf16", False) and not features.get("amx-bf16", False)


@dataclass(frozen=True)
class PackedRows:
    """Rows [T, n] packed, and what was seen of each feature on the way.

    sums: over the tokens, float32 [n]. largest: magnitudes, float32 [n]; what is no number is
    larger than an infinity.
    """

    packed: Tensor
    sums: Tensor
    largest: Tensor


def pack_rows(rows: Tensor, room: Tensor | None = None) -> Tensor:
    """Return bfloat16 rows [T, n] packed.

    Args:
        room: int32, flat, of no use any more; what is returned lies there where it fits.
    """
    return pack_and_measure(rows, room).packed


def pack_and_measure(rows: Tensor, room: Tensor | None = None) -> PackedRows:
    """Do what `pack_rows` does, and return as well what rows and their magnitudes come to."""
    from quantkit.numerics.products_compiled import LANES, PANELS, count_panels, pack

    rows = rows.contiguous()
    tokens, features = rows.shape
    shape = (count_panels(features), -(-tokens // 2), LANES)
    size = shape[0] * shape[1] * shape[2]
    if room is None or room.numel() < size:
        room = torch.empty(size, dtype=torch.int32)
    packed = room[:size].view(shape)
    sums = torch.empty(shape[0] * LANES, dtype=torch.float32)
    largest = torch.empty(shape[0] * LANES, dtype=torch.int16)
    arrays = packed.numpy(), sums.numpy(), largest.numpy()
    run = partial(pack, view_numbers(rows, np.int16), *arrays)
    share_out(run, shape[0] // PANELS, size // _PACKED_A_THREAD, _PARTS_A_THREAD)
    magnitudes = largest[:features].view(torch.bfloat16).float()
    return PackedRows(packed, sums[:features], magnitudes)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, upper: bool = False) -> None:
    """Add left^T right to `total` float32 [n, m], both packed [T, n] and [T, m].

    Args:
        upper: whether the upper triangle is enough. Below it only some of the sum is added.

    Raises:
        ValueError: the rows have not as many tokens, or `total` has not this shape.
    """
    from quantkit.numerics.products_compiled import PANELS, count_panels, multiply

    panels = len(left), len(right)
    if panels != tuple(map(count_panels, total.shape)) or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"packed rows of shapes {tuple(left.shape)} and {tuple(right.shape)} have no product "
            f"of shape {tuple(total.shape)}"
        )
    blocks, products = len(right) // PANELS, 2 * left.shape[1] * total.numel()
    worthwhile = products // (2 * _PRODUCTS_A_THREAD if upper else _PRODUCTS_A_THREAD)
    run = partial(multiply, left.numpy(), right.numpy(), upper, total.numpy())
    share_out(run, blocks, worthwhile, _PARTS_A_THREAD)
