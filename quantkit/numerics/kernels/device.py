"""What the kernels share: how they are compiled, and how they round.

Importing this module, or any with a kernel, raises ImportError where triton is missing.

Equal results ask for torch's operations in float32, in its order. Triton's `/` is an approximation
on CUDA, so divisions are `tl.div_rn`. Products and sums are fused where torch fuses them
(`addcmul`, `addr`), by `tl.fma`, and nowhere else: every launch says `enable_fp_fusion=False`.
`tl.extra.libdevice.rint` is not known to Triton's interpreter, so rounding is spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.affine import CodeSet, integer_limits


def kernel(function: Callable[..., Any]) -> Any:
    """Make a function a Triton kernel, or one that kernels can call."""
    return triton.jit(function)


def interpreted() -> bool:
    """Say whether kernels are run by Triton's interpreter, on tensors of a CPU."""
    return bool(triton.knobs.runtime.interpret)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below `size`: tiles have no other sizes."""
    return 1 << (size - 1).bit_length()


@contextmanager
def written_in_place(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Give contiguous tensors to a kernel, and what it writes there to the caller's own."""
    dense = tuple(tensor.contiguous() for tensor in tensors)
    yield dense
    for own, other in zip(tensors, dense, strict=True):
        if own.data_ptr() != other.data_ptr():
            own.copy_(other)


def rounding_of(scheme: CodeSet, device: torch.device) -> tuple[dict[str, int], Tensor]:
    """Return the arguments of a kernel that calls `round_value`: numbers, and the table.

    The table is float32 [2, N]: values and, between each and the next, where rounding changes. It
    has one column where there is no table.
    """
    if isinstance(scheme, GgmlType) and scheme.values:
        values = torch.tensor(scheme.values, dtype=torch.float32, device=device)
        middles = torch.nn.functional.pad((values[1:] + values[:-1]) / 2, (0, 1))
        table = torch.stack([values, middles])
        return {"low": 0, "high": 0, "KIND": 2, "ENTRIES": len(values)}, table
    table = torch.zeros(2, 1, device=device)
    limits = integer_limits(scheme)
    if limits is None:
        return {"low": 0, "high": 0, "KIND": 1, "ENTRIES": 1}, table
    low, high = limits
    return {"low": low, "high": high, "KIND": 0, "ENTRIES": 1}, table


@kernel
def round_half_even(value: tl.tensor) -> tl.tensor:
    """Round float32 to integers as `torch.round` does, signs of zeros included."""
    size = tl.abs(value)
    # From 2^23 on there are no fractions; below, the sum has none.
    nearest = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    sign = value.to(tl.int32, bitcast=True) & -2147483648
    return (nearest.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@kernel
def hold(value: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Hold values in a range; what is not a number stays so."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@kernel
def round_value(
    value: tl.tensor,
    offset: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    table: tl.tensor,
    KIND: tl.constexpr,  # noqa: N803
    ENTRIES: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """Do what `numerics.affine.round_values` does.

    Args:
        offset: zero points; 0.0 where there are none.
        KIND: 0 for integers from `low` to `high`, 1 for float8_e4m3fn, 2 for those of the table.
    """
    if KIND == 0:
        value = hold(round_half_even(value), low - offset, high - offset)
    elif KIND == 1:
        value = hold(value, -448.0, 448.0)
        # The exponent's bits, at least those of 2^-6, three binary places further down.
        bits = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23) - (3 << 23)
        step = bits.to(tl.float32, bitcast=True)
        value = round_half_even(tl.div_rn(value, step)) * step
    else:
        found = tl.load(table) + tl.zeros_like(value)
        for entry in range(ENTRIES - 1):
            # What is not a number gets the last entry, as in `torch.bucketize`.
            above = (value <= tl.load(table + ENTRIES + entry)) == 0
            found = tl.where(above, tl.load(table + entry + 1), found)
        value = found
    return value
