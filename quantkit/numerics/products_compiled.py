"""The product of `products` compiled by numba, an optional package, for AVX512-BF16.

A tile of 8 by 48 sums stays in 24 registers for all tokens. The instruction adds the products of
two tokens to each of 16 sums; LLVM has no name for it that every release knows, so it is written
as assembly.

The kernels let go of Python's lock. Importing this module raises ImportError where numba is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from quantkit.numerics.ggml.kernels import compiled

LANES = 16
"""Features of a panel: float32 numbers of a vector register."""

PANELS = 3
"""Of a block, that is multiplied at a time."""

_ROWS = 8
_STRIP = 16
_WIDTH = LANES * PANELS
_BYTES = 4

Floats = NDArray[np.float32]
Bits = NDArray[np.int16]
Pairs = NDArray[np.int32]

# Once a process: without it LLVM cannot read assembly.
binding.initialize_native_asmparser()

_INTEGER, _INDEX = ir.IntType(32), ir.IntType(64)
_SUMS, _PAIRS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INTEGER, LANES)
_ADD_PRODUCTS = ir.InlineAsm(
    ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v"
)


def _generate_tile(_: Any, left: Any, lane: Any, right: Any, sums: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def address(position: int) -> Any:
            array = context.make_array(signature.args[position])
            return builder.ptrtoint(array(context, builder, arguments[position]).data, _INDEX)

        def at(start: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(start, offset), kind.as_pointer())

        def constant(number: int) -> Any:
            return ir.Constant(_INDEX, number)

        shape = context.make_array(signature.args[0])(context, builder, arguments[0]).shape
        pairs = cgutils.unpack_tuple(builder, shape)[0]
        panel = builder.mul(pairs, constant(LANES * _BYTES))
        first = builder.add(address(0), builder.mul(arguments[1], constant(_BYTES)))
        panels = [
            builder.add(address(2), builder.mul(panel, constant(number)))
            for number in range(PANELS)
        ]
        places = [(row, number) for row in range(_ROWS) for number in range(PANELS)]
        zero = ir.Constant(_SUMS, None)
        # LLVM keeps what has a place on the stack, and no address anywhere else, in registers.
        tile = {place: cgutils.alloca_once_value(builder, zero) for place in places}
        nothing = ir.Constant(_PAIRS, ir.Undefined)
        everywhere = ir.Constant(_PAIRS, [0] * LANES)
        with cgutils.for_range(builder, pairs) as loop:
            offset = builder.mul(loop.index, constant(LANES * _BYTES))
            loaded = [builder.load(at(start, offset, _PAIRS), align=_BYTES) for start in panels]
            for row in range(_ROWS):
                here = at(first, builder.add(offset, constant(_BYTES * row)), _INTEGER)
                one = builder.insert_element(
                    nothing, builder.load(here, align=_BYTES), ir.Constant(_INTEGER, 0)
                )
                factor = builder.shuffle_vector(one, nothing, everywhere)
                for number in range(PANELS):
                    place = tile[row, number]
                    added = [builder.load(place), factor, loaded[number]]
                    builder.store(builder.call(_ADD_PRODUCTS, added), place)
        result = address(3)
        for position, place in enumerate(places):
            there = at(result, constant(position * LANES * _BYTES), _SUMS)
            builder.store(builder.load(tile[place]), there, align=_BYTES)
        return context.get_dummy_value()

    return types.void(left, types.int64, right, sums), generate


_multiply_tile = cast(Callable[[Pairs, int, Pairs, Floats], None], intrinsic(_generate_tile))
"""Write the sums [8, 48] of 8 features of a panel [T/2, 16], from a lane on, and of 3 panels
[3, T/2, 16] of others."""


def count_panels(features: int) -> int:
    """Return how many panels so many features take: whole blocks of them."""
    return -(-features // _WIDTH) * PANELS


@compiled
def pack(rows: Bits, packed: Pairs, start: int, stop: int) -> None:
    """Fill the panels from `start` to `stop`; what is beyond the last feature or token is 0."""
    tokens, features = rows.shape
    nothing = np.zeros(LANES, np.int16)
    # Strips of a few panels: what lies side by side in memory is read together.
    for strip in range(start, stop, _STRIP):
        for pair in range(packed.shape[1]):
            token = 2 * pair
            for panel in range(strip, min(strip + _STRIP, stop)):
                first, here = panel * LANES, packed[panel, pair]
                low = rows[token, first:]
                high = rows[token + 1, first:] if token + 1 < tokens else nothing
                if first + LANES <= features:
                    for lane in range(LANES):
                        here[lane] = np.uint16(low[lane]) | (np.int32(high[lane]) << 16)
                else:
                    here[:] = 0
                    for lane in range(features - first):
                        here[lane] = np.uint16(low[lane]) | (np.int32(high[lane]) << 16)


@compiled
def multiply(left: Pairs, right: Pairs, upper: bool, total: Floats, start: int, stop: int) -> None:
    """Add the blocks of 48 columns from `start` to `stop`, the first and the last in turns.

    So threads that share the blocks of an upper triangle have about as much to do.
    """
    rows, columns = total.shape
    sums = np.empty((_ROWS, _WIDTH), np.float32)
    for turn in range(start, stop):
        block = turn // 2 if turn % 2 == 0 else right.shape[0] // PANELS - 1 - turn // 2
        first = block * _WIDTH
        width = min(_WIDTH, columns - first)
        panels = right[block * PANELS : (block + 1) * PANELS]
        for row in range(0, min(rows, first + width) if upper else rows, _ROWS):
            _multiply_tile(left[row // LANES], row % LANES, panels, sums)
            for tile_row in range(min(_ROWS, rows - row)):
                here = total[row + tile_row, first:]
                if width == _WIDTH:
                    for column in range(_WIDTH):
                        here[column] += sums[tile_row, column]
                else:
                    for column in range(width):
                        here[column] += sums[tile_row, column]
