"""What `products` does, compiled by numba, an optional package, for AVX512-BF16.

A tile of 8 by 48 sums stays in 24 registers for all tokens. The instruction adds the products of
two tokens to each of 16 sums; LLVM has no name for it that every release knows, so it is written
as assembly. Packing is written as vectors too: LLVM makes none of a loop that goes through panels.

The kernels let go of Python's lock. Importing this module raises ImportError where numba is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from quantkit.numerics.ggml.kernels import compiled
from quantkit.numerics.vectors import INDEX, INTEGER, at, find_arrays, index, spread

LANES = 16
"""Features of a panel: float32 numbers of a vector register."""

PANELS = 3
"""Of a block, that is multiplied at a time."""

_ROWS = 8
_WIDTH = LANES * PANELS
_BYTES, _SHORT_BYTES = 4, 2
_SHORT_BITS, _MAGNITUDE = 16, 0x7FFF
_AHEAD = 32
"""Tokens from the one that is packed to the one that is fetched from memory meanwhile."""

Floats = NDArray[np.float32]
Bits = NDArray[np.int16]
Pairs = NDArray[np.int32]

# Once a process: without it LLVM cannot read assembly.
binding.initialize_native_asmparser()

_SHORT = ir.IntType(16)
_SUMS, _PAIRS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(INTEGER, LANES)
_SHORTS = ir.VectorType(_SHORT, LANES)
ADD_PRODUCTS = ir.InlineAsm(
    ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v"
)
"""Of 16 sums and 16 pairs each on both sides."""
_FETCH = ir.InlineAsm(
    ir.FunctionType(ir.VoidType(), [INDEX]), "prefetcht0 ($0)", "r", side_effect=True
)


def _generate_tile(_: Any, left: Any, lane: Any, right: Any, sums: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = list(find_arrays(context, builder, signature, arguments))
        pairs = cgutils.unpack_tuple(builder, arrays[0].shape)[0]
        start, others, result = (builder.ptrtoint(array.data, INDEX) for array in arrays)
        first = builder.add(start, builder.mul(arguments[1], index(_BYTES)))
        panel = builder.mul(pairs, index(LANES * _BYTES))
        panels = [
            builder.add(others, builder.mul(panel, index(number))) for number in range(PANELS)
        ]
        places = [(row, number) for row in range(_ROWS) for number in range(PANELS)]
        zero = ir.Constant(_SUMS, None)
        # LLVM keeps what has a place on the stack, and no address anywhere else, in registers.
        tile = {place: cgutils.alloca_once_value(builder, zero) for place in places}
        with cgutils.for_range(builder, pairs) as loop:
            offset = builder.mul(loop.index, index(LANES * _BYTES))
            loaded = [
                builder.load(at(builder, start, offset, _PAIRS), align=_BYTES) for start in panels
            ]
            for row in range(_ROWS):
                there = builder.add(offset, index(_BYTES * row))
                here = builder.load(at(builder, first, there, INTEGER), align=_BYTES)
                factor = spread(builder, here, _PAIRS)
                for number in range(PANELS):
                    place = tile[row, number]
                    added = [builder.load(place), factor, loaded[number]]
                    builder.store(builder.call(ADD_PRODUCTS, added), place)
        for position, place in enumerate(places):
            there = at(builder, result, index(position * LANES * _BYTES), _SUMS)
            builder.store(builder.load(tile[place]), there, align=_BYTES)
        return context.get_dummy_value()

    return types.void(left, types.int64, right, sums), generate


_multiply_tile = cast(Callable[[Pairs, int, Pairs, Floats], None], intrinsic(_generate_tile))
"""Write the sums [8, 48] of 8 features of a panel [T/2, 16], from a lane on, and of 3 panels
[3, T/2, 16] of others."""


@dataclass(frozen=True)
class _Tallies:
    """Places on the stack for what is known of a panel's features, of even and of odd tokens.

    even, odd: sums float32 [16]. largest: magnitudes of all, int16 [16], the bits of a bfloat16.
    """

    even: Any
    odd: Any
    largest: Any


def _pack_pair(builder: Any, panel: _Tallies, low: Any, high: Any) -> Any:
    """Return the numbers of a panel for two tokens, int16 [16] each, and add them to its tallies.

    The bits of a magnitude are ordered as it is, with an infinity above all numbers, and what is
    no number above that.
    """
    shift, magnitude = (
        ir.Constant(kind, [number] * LANES)
        for kind, number in ((_PAIRS, _SHORT_BITS), (_SHORTS, _MAGNITUDE))
    )
    first = builder.zext(low, _PAIRS)
    second = builder.shl(builder.zext(high, _PAIRS), shift)
    for place, bits in ((panel.even, builder.shl(first, shift)), (panel.odd, second)):
        added = builder.fadd(builder.load(place), builder.bitcast(bits, _SUMS))
        builder.store(added, place)
    largest = builder.load(panel.largest)
    for bits in (low, high):
        size = builder.and_(bits, magnitude)
        largest = builder.select(builder.icmp_signed(">", size, largest), size, largest)
    builder.store(largest, panel.largest)
    return builder.or_(first, second)


def _generate_packing(
    _: Any, rows: Any, column: Any, zeros: Any, packed: Any, sums: Any, largest: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = list(find_arrays(context, builder, signature, arguments))
        tokens, features = cgutils.unpack_tuple(builder, arrays[0].shape)
        pairs = cgutils.unpack_tuple(builder, arrays[2].shape)[1]
        start, beyond, result, *found = (builder.ptrtoint(array.data, INDEX) for array in arrays)
        first = builder.add(start, builder.mul(arguments[1], index(_SHORT_BYTES)))
        row = builder.mul(features, index(_SHORT_BYTES))
        zero, nothing = ir.Constant(_SUMS, None), ir.Constant(_SHORTS, None)
        panels = [
            _Tallies(*(cgutils.alloca_once_value(builder, none) for none in (zero, zero, nothing)))
            for _ in range(PANELS)
        ]
        with cgutils.for_range(builder, pairs) as loop:
            token = builder.mul(loop.index, index(2))
            low = builder.add(first, builder.mul(token, row))
            paired = builder.icmp_signed("<", builder.add(token, index(1)), tokens)
            high = builder.select(paired, builder.add(low, row), beyond)
            for side in (low, high):
                ahead = builder.add(side, builder.mul(row, index(_AHEAD)))
                for byte in (0, _WIDTH * _SHORT_BYTES - 1):
                    builder.call(_FETCH, [builder.add(ahead, index(byte))])
            for number, panel in enumerate(panels):
                there = index(number * LANES * _SHORT_BYTES)
                both = [
                    builder.load(at(builder, side, there, _SHORTS), align=_SHORT_BYTES)
                    for side in (low, high)
                ]
                pair = builder.add(loop.index, builder.mul(pairs, index(number)))
                place = builder.mul(pair, index(LANES * _BYTES))
                filled = _pack_pair(builder, panel, *both)
                builder.store(filled, at(builder, result, place, _PAIRS), align=_BYTES)
        for number, panel in enumerate(panels):
            there = index(number * LANES * _BYTES)
            total = builder.fadd(builder.load(panel.even), builder.load(panel.odd))
            builder.store(total, at(builder, found[0], there, _SUMS), align=_BYTES)
            there = index(number * LANES * _SHORT_BYTES)
            size = builder.load(panel.largest)
            builder.store(size, at(builder, found[1], there, _SHORTS), align=_SHORT_BYTES)
        return context.get_dummy_value()

    return types.void(rows, types.int64, zeros, packed, sums, largest), generate


_pack_block = cast(
    Callable[[Bits, int, Bits, Pairs, Floats, Bits], None], intrinsic(_generate_packing)
)
"""Pack 48 features of rows [T, n], from a column on, into panels [3, ceil(T/2), 16].

The last token has zeros [48] beside it where their number is odd. Write what the features add up
to, float32 [48], and the bits of their largest magnitudes, int16 [48].
"""


def count_panels(features: int) -> int:
    """Return how many panels so many features take: whole blocks of them."""
    return -(-features // _WIDTH) * PANELS


@compiled
def pack(rows: Bits, packed: Pairs, sums: Floats, largest: Bits, start: int, stop: int) -> None:
    """Fill the blocks of 48 features from `start` to `stop`, and what is known of each feature.

    What is beyond the last feature or token is 0. A sum is that of every other token, in order,
    and the rest.
    """
    tokens, features = rows.shape
    zeros = np.zeros(_WIDTH, np.int16)
    for block in range(start, stop):
        first, panels = block * _WIDTH, packed[block * PANELS : (block + 1) * PANELS]
        totals, sizes = sums[first : first + _WIDTH], largest[first : first + _WIDTH]
        if first + _WIDTH <= features:
            _pack_block(rows, first, zeros, panels, totals, sizes)
        else:
            last = np.zeros((tokens, _WIDTH), np.int16)
            for token in range(tokens):
                for column in range(features - first):
                    last[token, column] = rows[token, first + column]
            _pack_block(last, 0, zeros, panels, totals, sizes)


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
