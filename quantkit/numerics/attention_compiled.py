"""The attention of `attention` compiled by numba, an optional package, for AVX512-BF16.

Queries are the lanes of registers; keys and channels are rows. So what is done for each query, as
the search for its largest score, is done for 16 of them by an instruction. Both products are made
of tiles of 8 rows by 32 queries, whose sums stay in 16 registers, and look at pairs: of channels in
the first, of keys in the second. An int32 number holds a pair of bfloat16 values.

The kernel lets go of Python's lock. Importing this module raises ImportError where numba is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from quantkit.numerics.ggml.kernels import compiled
from quantkit.numerics.products_compiled import ADD_PRODUCTS, LANES
from quantkit.numerics.vectors import INDEX, INTEGER, add_product, at, index, spread

_PANELS = 2
QUERIES = LANES * _PANELS
"""Of a block, that are looked at together."""

_ROWS = 8
_KEYS = 512
"""Of which the scores are known at a time: a multiple of QUERIES, so that every query of a block
sees the first of them."""
_BYTES = 4
_LARGEST, _TOTAL, _SHRINK = range(3)
"""Rows of what is known of a block's queries: the largest score, the sum of all weights, and the
factor by which what was summed before has to shrink."""

_ALLOWED = np.where(
    np.arange(-_ROWS, QUERIES)[:, None] > np.arange(QUERIES), np.float32(-np.inf), np.float32(0)
)
"""What is added to the scores of a tile: -infinity where the key comes after the query. From row 8
on the keys are those of the block, which it begins with; before, none is too late."""

Floats = NDArray[np.float32]
Bits = NDArray[np.int16]
Pairs = NDArray[np.int32]

_FLOATS, _PAIRS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(INTEGER, LANES)
_HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)
_ROUND = ir.InlineAsm(
    ir.FunctionType(_HALVES, [_FLOATS, _FLOATS]), "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v"
)
_IN_TURNS = ir.Constant(
    ir.VectorType(INTEGER, 2 * LANES),
    [lane + LANES * half for lane in range(LANES) for half in range(2)],
)
_POLYNOMIAL = (1.0, 0.69314698, 0.24022242, 0.05550734, 0.00967151, 0.00132647)
"""2^x for x in [-0.5, 0.5]."""


@dataclass(frozen=True)
class _Call:
    """The call of an intrinsic. Rows of its arrays have a number for each query of a block."""

    context: Any
    builder: Any
    signature: Any
    arguments: Any

    def array(self, position: int) -> Any:
        make = self.context.make_array(self.signature.args[position])
        return make(self.context, self.builder, self.arguments[position])

    def length(self, position: int) -> Any:
        return cgutils.unpack_tuple(self.builder, self.array(position).shape)[0]

    def at(self, position: int, offset: Any, kind: Any) -> Any:
        start = self.builder.ptrtoint(self.array(position).data, INDEX)
        return at(self.builder, start, offset, kind)

    def _panel(self, position: int, row: Any, panel: int, kind: Any) -> Any:
        row = index(row) if isinstance(row, int) else row
        start = self.builder.mul(row, index(QUERIES * _BYTES))
        return self.at(position, self.builder.add(start, index(panel * LANES * _BYTES)), kind)

    def load(self, position: int, row: Any, panel: int, kind: Any = _FLOATS) -> Any:
        return self.builder.load(self._panel(position, row, panel, kind), align=_BYTES)

    def store(self, value: Any, position: int, row: Any, panel: int) -> None:
        place = self._panel(position, row, panel, value.type)
        self.builder.store(value, place, align=_BYTES)

    def spread(self, number: Any, kind: Any) -> Any:
        return spread(self.builder, number, kind)

    def add_product(self, left: Any, right: Any, added: Any) -> Any:
        """Return left * right + added, rounded once."""
        return add_product(self.builder, left, right, added)

    def exponentiate(self, power: Any) -> Any:
        """Return 2^power, up to 2e-7 of it: at most about 1, and 0 where it is no normal number.

        What is not a number stays so.
        """
        lowest, shift = _constant(-127.0), _constant(1.5 * 2**23)
        power = self.builder.select(self.builder.fcmp_ordered("<", power, lowest), lowest, power)
        shifted = self.builder.fadd(power, shift)
        rest = self.builder.fsub(power, self.builder.fsub(shifted, shift))
        total = _constant(_POLYNOMIAL[-1])
        for factor in reversed(_POLYNOMIAL[:-1]):
            total = self.add_product(total, rest, _constant(factor))
        # The nearest integer is in the lowest bits: it becomes an exponent, and -127 the number 0.
        integer = self.builder.bitcast(shifted, _PAIRS)
        exponent = self.builder.add(integer, ir.Constant(_PAIRS, [127] * LANES))
        bits = self.builder.shl(exponent, ir.Constant(_PAIRS, [23] * LANES))
        return self.builder.fmul(total, self.builder.bitcast(bits, _FLOATS))

    def join(self, low: Any, high: Any) -> Any:
        """Round to bfloat16 and make pairs."""
        halves = self.builder.call(_ROUND, [low, high])
        mixed = self.builder.shuffle_vector(halves, halves, _IN_TURNS)
        return self.builder.bitcast(mixed, _PAIRS)


def _constant(number: float) -> Any:
    return ir.Constant(_FLOATS, [number] * LANES)


def _generate_tile(
    _: Any, left: Any, next_row: Any, next_pair: Any, right: Any, before: Any, after: Any
) -> Any:
    def generate(*call: Any) -> Any:
        code, builder = _Call(*call), call[1]
        row_bytes, pair_bytes = (
            builder.mul(code.arguments[position], index(_BYTES)) for position in (1, 2)
        )
        places = [(row, panel) for row in range(_ROWS) for panel in range(_PANELS)]
        # LLVM keeps what has a place on the stack, and no address anywhere else, in registers.
        tile = {place: cgutils.alloca_once_value(builder, code.load(4, *place)) for place in places}
        with cgutils.for_range(builder, code.length(3)) as loop:
            loaded = [code.load(3, loop.index, panel, _PAIRS) for panel in range(_PANELS)]
            here = builder.mul(loop.index, pair_bytes)
            for row in range(_ROWS):
                offset = builder.add(builder.mul(row_bytes, index(row)), here)
                pair = builder.load(code.at(0, offset, INTEGER), align=_BYTES)
                factor = code.spread(pair, _PAIRS)
                for panel in range(_PANELS):
                    place = tile[row, panel]
                    added = [builder.load(place), factor, loaded[panel]]
                    builder.store(builder.call(ADD_PRODUCTS, added), place)
        for place in places:
            code.store(builder.load(tile[place]), 5, *place)
        return code.context.get_dummy_value()

    return types.void(left, types.int64, types.int64, right, before, after), generate


def _generate_weights(_: Any, scores: Any, scale: Any, state: Any, weights: Any) -> Any:
    def generate(*call: Any) -> Any:
        code, builder = _Call(*call), call[1]
        keys, factor = code.length(0), code.spread(code.arguments[1], _FLOATS)
        for panel in range(_PANELS):
            before = code.load(2, _LARGEST, panel)
            largest = cgutils.alloca_once_value(builder, before)
            with cgutils.for_range(builder, keys) as loop:
                score = builder.fmul(code.load(0, loop.index, panel), factor)
                known = builder.load(largest)
                larger = builder.fcmp_ordered(">", score, known)
                builder.store(builder.select(larger, score, known), largest)
            now = builder.load(largest)
            shrink = code.exponentiate(builder.fsub(before, now))
            total = cgutils.alloca_once_value(
                builder, builder.fmul(code.load(2, _TOTAL, panel), shrink)
            )
            with cgutils.for_range(builder, builder.udiv(keys, index(2))) as loop:
                pair = []
                for half in range(2):
                    key = builder.add(builder.mul(loop.index, index(2)), index(half))
                    power = code.add_product(code.load(0, key, panel), factor, builder.fneg(now))
                    pair.append(code.exponentiate(power))
                builder.store(builder.fadd(builder.load(total), builder.fadd(*pair)), total)
                code.store(code.join(*pair), 3, loop.index, panel)
            code.store(now, 2, _LARGEST, panel)
            code.store(builder.load(total), 2, _TOTAL, panel)
            code.store(shrink, 2, _SHRINK, panel)
        return code.context.get_dummy_value()

    return types.void(scores, types.float32, state, weights), generate


_multiply_tile = cast(
    Callable[[Pairs, int, int, Pairs, Floats, Floats], None], intrinsic(_generate_tile)
)
"""Write sums [8, queries]: those from before, and the products of 8 rows of pairs, which lie so far
apart as two numbers say, as do the pairs of a row, with pairs [P, queries]."""

_weigh = cast(Callable[[Floats, np.float32, Floats, Pairs], None], intrinsic(_generate_weights))
"""Turn scores [keys, queries] into weights in pairs [keys/2, queries], 1 for the largest score that
was met so far, and bring the state [3, queries] up to date. The scale makes them powers of 2."""


class Room(NamedTuple):
    """What a thread works in."""

    keys: Pairs
    values: Pairs
    queries: Pairs
    scores: Floats
    weights: Pairs
    sums: Floats
    state: Floats


def make_room(tokens: int, channels: int) -> Room:
    """Reserve it for heads of so many tokens and channels."""

    def reserve(rows: int, columns: int, kind: torch.dtype) -> NDArray[Any]:
        # Unlike numpy torch begins with a line of the processor's cache; no register needs two.
        return torch.empty(rows, columns, dtype=kind).numpy()

    pairs, floats = torch.int32, torch.float32
    padded = -(-tokens // _ROWS) * _ROWS
    return Room(
        keys=reserve(padded, channels // 2, pairs),
        values=reserve(padded // 2, channels, pairs),
        queries=reserve(channels // 2, QUERIES, pairs),
        scores=reserve(_KEYS, QUERIES, floats),
        weights=reserve(_KEYS // 2, QUERIES, pairs),
        sums=reserve(channels, QUERIES, floats),
        state=reserve(3, QUERIES, floats),
    )


@compiled
def _load_head(key: Pairs, value: Bits, keys: Pairs, values: Pairs) -> None:
    """Copy the keys of a head and its values, pairs of tokens; what is beyond the last one is 0."""
    tokens, channels = value.shape
    nothing = np.zeros(channels, np.int16)
    for token in range(len(keys)):
        for pair in range(key.shape[1]):
            keys[token, pair] = key[token, pair] if token < tokens else 0
    for pair in range(len(values)):
        token, here = 2 * pair, values[pair]
        low = value[token] if token < tokens else nothing
        high = value[token + 1] if token + 1 < tokens else nothing
        for channel in range(channels):
            here[channel] = np.uint16(low[channel]) | (np.int32(high[channel]) << 16)


@compiled
def _shrink(sums: Floats, state: Floats) -> None:
    for channel in range(len(sums)):
        for lane in range(QUERIES):
            sums[channel, lane] *= state[_SHRINK, lane]


@compiled
def _round(bits: Pairs, pairs: Pairs) -> None:
    """Round float32 numbers [D, queries] to bfloat16; what is not a number stays so."""
    most, odd, upper = np.int32(0x7FFF), np.int32(1), np.int32(16)
    for pair in range(len(pairs)):
        for lane in range(QUERIES):
            low, high = bits[2 * pair, lane], bits[2 * pair + 1, lane]
            low += most + ((low >> upper) & odd)
            high += most + ((high >> upper) & odd)
            pairs[pair, lane] = np.uint16(low >> upper) | ((high >> upper) << upper)


@compiled
def _attend_block(room: Room, first: int, scale: np.float32) -> None:
    """Attend with the queries from `first` on, and leave what comes out in their place."""
    sums, state, half = room.sums, room.state, len(room.queries)
    channels = 2 * half
    state[_LARGEST], state[_TOTAL] = -np.inf, 0
    sums[:] = 0
    stop = min(first + QUERIES, len(room.keys))
    for low in range(0, stop, _KEYS):
        high = min(low + _KEYS, stop)
        for key in range(low, high, _ROWS):
            allowed, scores = _ALLOWED[max(key - first + _ROWS, 0) :], room.scores[key - low :]
            _multiply_tile(room.keys[key:], half, 1, room.queries, allowed, scores)
        weights = room.weights[: (high - low) // 2]
        _weigh(room.scores[: high - low], scale, state, weights)
        if low:
            _shrink(sums, state)
        for channel in range(0, channels, _ROWS):
            here = sums[channel:]
            _multiply_tile(room.values[low // 2 :, channel:], 1, channels, weights, here, here)
    for lane in range(QUERIES):
        state[_SHRINK, lane] = np.float32(1) / state[_TOTAL, lane]
    _shrink(sums, state)
    _round(sums.view(np.int32), room.queries)


@compiled
def attend(
    room: Room,
    query: Pairs,
    key: Pairs,
    value: Bits,
    scale: np.float32,
    output: Pairs,
    start: int,
    stop: int,
) -> None:
    """Do the units of work from `start` to `stop`: the blocks of queries of all heads.

    The blocks of a head come from its start and its end in turns, so that threads have about as
    much to do.
    """
    _, tokens, heads, half = query.shape
    group, blocks = heads // key.shape[2], -(-tokens // QUERIES)
    loaded = -1
    for unit in range(start, stop):
        (batch, head), turn = divmod(unit // blocks, heads), unit % blocks
        if loaded != unit // blocks // group:
            loaded = unit // blocks // group
            shared = head // group
            _load_head(key[batch, :, shared], value[batch, :, shared], room.keys, room.values)
        first = QUERIES * (turn // 2 if turn % 2 == 0 else blocks - 1 - turn // 2)
        count = min(QUERIES, tokens - first)
        for lane in range(QUERIES):
            here = query[batch, first + min(lane, count - 1), head]
            for pair in range(half):
                room.queries[pair, lane] = here[pair]
        _attend_block(room, first, scale)
        for lane in range(count):
            here = output[batch, first + lane, head]
            for pair in range(half):
                here[pair] = room.queries[pair, lane]
