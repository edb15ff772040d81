"""Polish rows in a ggml block type: coordinate descent on codes, scales refitted with them.

No step raises tr(E H E^T), where E = W - dequantized and H includes the ridge, if any. A block of
columns is taken at a time, a super-block or a few blocks. Each of its codes goes to its best place
(see `solvers/polish.py`). Then, with the residual R = E H and the values V of a sub-block's codes,
a change x of its scale and y of its minimum lowers the loss by

    2 (x R V^T + y R 1^T) - (x V + y 1) H (x V + y 1)^T,

which is tried for all neighbours of the integers, and solved for where they are float16. At last
the float16 of the super-block are solved for in the same way. Within the block R follows every
change, elsewhere one matmul a block does.

Memory beyond weight and H, with W for the bytes of the weight in float32: R 1 W, the errors that
it starts from 1 W, the codes 1/4 W.

Shapes: R rows, I columns, S sub-blocks of g columns, C columns of a block that is treated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.affine import relative_steps, row_units
from quantkit.numerics.columns import descend_columns
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.solvers.ggml_halves import Quadratic, refit_halves
from quantkit.solvers.ggml_rows import values_to_codes

_COLUMNS = 256
"""Of a block: one super-block, or eight blocks."""


@dataclass(frozen=True)
class _Draft:
    """Rows that are being polished, by column; the tensors change in place.

    values: int8 [I, R], what the codes stand for. d, m: float16 [blocks, R]. sub_scales,
    sub_minimums: float32 [S, R]. unit: [R], powers of two by which weights and steps are divided.
    residual: float32 [I, R], in units. added: to the diagonal of the second moment.
    """

    kind: GgmlType
    values: Tensor
    d: Tensor
    m: Tensor | None
    sub_scales: Tensor | None
    sub_minimums: Tensor | None
    unit: Tensor
    residual: Tensor
    added: Tensor

    def scales(self, subs: slice) -> Tensor:
        """Return the scales [s, R] of some sub-blocks, in units."""
        if self.sub_scales is None:
            return self.d[subs].float() / self.unit
        return self.d[self._halves(subs)].float() * self.sub_scales[subs] / self.unit

    def minimums(self, subs: slice) -> Tensor | None:
        """Return what some sub-blocks add to their weights, [s, R], in units."""
        if self.m is None:
            return None
        if self.sub_minimums is None:
            return self.m[subs].float() / self.unit
        return -self.m[self._halves(subs)].float() * self.sub_minimums[subs] / self.unit

    def _halves(self, subs: slice) -> slice:
        """Return the super-block of sub-blocks that fill one."""
        first = subs.start * self.kind.sub_block // self.kind.block
        return slice(first, first + 1)


@dataclass(frozen=True)
class _Block:
    """Columns that are treated together: their values [C, R] and residual [C, R], which follow,
    and their block of H, [C, C]."""

    values: Tensor
    residual: Tensor
    inner: Tensor

    def move(self, part: slice, change: Tensor) -> None:
        """Let the residual follow a change [c, R] of the weights of some columns."""
        self.residual.addmm_(self.inner[:, part], change, alpha=-1)


def polish_blocks(
    weight: Tensor, blocks: GgmlBlocks, second_moment: Tensor, ridge: float, sweeps: int
) -> GgmlBlocks:
    """Lower the output error of rows in a block type, in `sweeps` passes over their columns.

    Args:
        weight: float32 [R, I].
        second_moment: float32 [I, I].
        ridge: fraction of mean(diag H) that is added to the diagonal.
    """
    kind, size = blocks.type, len(second_moment)
    added = ridge * second_moment.diagonal().mean()
    unit = row_units(weight)
    error = (weight - blocks.dequantize()).div_(unit).T
    residual = torch.addcmul(second_moment @ error, error, added)
    del error
    draft = _Draft(
        kind=kind,
        values=_turn(blocks.values().to(torch.int8)),
        d=_turn(blocks.d),
        m=None if blocks.m is None else _turn(blocks.m),
        sub_scales=None if blocks.sub_scales is None else _turn(blocks.sub_scales).float(),
        sub_minimums=(None if blocks.sub_minimums is None else _turn(blocks.sub_minimums).float()),
        unit=unit.squeeze(1),
        residual=residual,
        added=added,
    )
    for _ in range(sweeps):
        for start in range(0, size, _COLUMNS):
            _polish_columns(draft, second_moment, start, min(size, start + _COLUMNS))
    integers = (draft.sub_scales, draft.sub_minimums)
    sub_scales, sub_minimums = (
        None if each is None else _turn(each.to(torch.int8)) for each in integers
    )
    return GgmlBlocks(
        type=kind,
        codes=values_to_codes(_turn(draft.values), kind),
        d=_turn(draft.d),
        m=None if draft.m is None else _turn(draft.m),
        sub_scales=sub_scales,
        sub_minimums=sub_minimums,
    )


def _turn(tensor: Tensor) -> Tensor:
    """Return a transposed copy; strides are those of its shape, even of a single row."""
    return tensor.T.clone(memory_format=torch.contiguous_format)


def _polish_columns(draft: _Draft, second_moment: Tensor, start: int, stop: int) -> None:
    """Improve the codes of a few columns, and then their scales."""
    kind = draft.kind
    inner = second_moment[start:stop, start:stop].clone()
    inner.diagonal().add_(draft.added)
    subs = slice(start // kind.sub_block, stop // kind.sub_block)
    values = draft.values[start:stop].float()
    here = draft.residual[start:stop]
    before = _decode(draft, values, subs)
    steps = relative_steps(draft.scales(subs), torch.ones_like(draft.unit))
    descend_columns(values, steps.repeat_interleave(kind.sub_block, 0), None, here, inner, kind)
    draft.values[start:stop] = values.to(torch.int8)
    block = _Block(values, here, inner)
    for sub in range(subs.start, subs.stop):
        part = slice((sub - subs.start) * kind.sub_block, (sub - subs.start + 1) * kind.sub_block)
        if draft.sub_scales is None:
            _refit_block(draft, block, sub, part)
        else:
            _move_integers(draft, draft.sub_scales, block, sub, part)
    if draft.sub_scales is not None:
        _refit_super_block(draft, draft.sub_scales, block, subs)
    change = before.sub_(_decode(draft, values, subs))
    draft.residual[:start].addmm_(second_moment[:start, start:stop], change)
    draft.residual[stop:].addmm_(second_moment[stop:, start:stop], change)


def _decode(draft: _Draft, values: Tensor, subs: slice) -> Tensor:
    """Return the weights [C, R] of values, in units."""
    width = draft.kind.sub_block
    weights = values * draft.scales(subs).repeat_interleave(width, 0)
    minimums = draft.minimums(subs)
    return weights if minimums is None else weights.add_(minimums.repeat_interleave(width, 0))


def _measure(block: _Block, part: slice, along: Tensor, lift: Tensor | None) -> Quadratic:
    """Return what moving some columns by x along + y lift gains, of shape [R].

    Args:
        along: float32 [c, R]; lift: [c, R] or [c, 1], or None where there is no minimum.
    """
    residual, inner = block.residual[part], block.inner[part, part]
    moved = inner @ along
    slope, bend = (residual * along).sum(0), (moved * along).sum(0)
    if lift is None:
        none = torch.zeros_like(slope)
        return Quadratic(slope, bend, none, none, none)
    return Quadratic(
        slope,
        bend,
        slope_minimum=(residual * lift).sum(0),
        cross=(moved * lift).sum(0),
        bend_minimum=((inner @ lift) * lift).sum(0).expand_as(slope),
    )


def _refit_block(draft: _Draft, block: _Block, sub: int, part: slice) -> None:
    """Refit the float16 of a block."""
    values, unit = block.values[part], draft.unit
    d, m = draft.d[sub], None if draft.m is None else draft.m[sub]
    lift = None if m is None else torch.ones_like(values[:, :1])
    new_d, new_m = refit_halves(d, m, _measure(block, part, values, lift), unit)
    change = values * ((new_d.float() - d.float()) / unit)
    if draft.m is not None and m is not None and new_m is not None:
        change += (new_m.float() - m.float()) / unit
        draft.m[sub] = new_m
    draft.d[sub] = new_d
    block.move(part, change)


def _refit_super_block(draft: _Draft, sub_scales: Tensor, block: _Block, subs: slice) -> None:
    """Refit the float16 of a super-block."""
    width, unit = draft.kind.sub_block, draft.unit
    half = subs.start * width // draft.kind.block
    d, m = draft.d[half], None if draft.m is None else draft.m[half]
    along = block.values * sub_scales[subs].repeat_interleave(width, 0)
    lift = None
    if draft.sub_minimums is not None:
        lift = -draft.sub_minimums[subs].repeat_interleave(width, 0)
    every = slice(0, len(along))
    new_d, new_m = refit_halves(d, m, _measure(block, every, along, lift), unit)
    change = along * ((new_d.float() - d.float()) / unit)
    if draft.m is not None and m is not None and new_m is not None and lift is not None:
        change.addcmul_(lift, (new_m.float() - m.float()) / unit)
        draft.m[half] = new_m
    draft.d[half] = new_d
    block.move(every, change)


def _move_integers(draft: _Draft, sub_scales: Tensor, block: _Block, sub: int, part: slice) -> None:
    """Move the integers of a sub-block to their best neighbours."""
    kind, values = draft.kind, block.values[part]
    half = sub * kind.sub_block // kind.block
    d = draft.d[half].float() / draft.unit
    # Types without minimums have integers of nothing.
    dmin, minimum, lift = torch.zeros_like(d), torch.zeros_like(d), None
    if draft.sub_minimums is not None and draft.m is not None:
        dmin, minimum = draft.m[half].float() / draft.unit, draft.sub_minimums[sub]
        lift = torch.ones_like(values[:, :1])
    quadratic = _measure(block, part, values, lift)
    scale = sub_scales[sub]
    best, best_minimum, best_gain = scale, minimum, torch.zeros_like(d)
    for change, shift in product((0, 1, -1), (0,) if lift is None else (0, 1, -1)):
        new = _clamp(scale + change, kind.sub_scales)
        new_minimum = _clamp(minimum + shift, kind.sub_minimums)
        gain = quadratic.gain((new - scale) * d, (minimum - new_minimum) * dmin)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, new, best)
        best_minimum = torch.where(better, new_minimum, best_minimum)
    block.move(part, values * ((best - scale) * d) + (minimum - best_minimum) * dmin)
    sub_scales[sub] = best
    if draft.sub_minimums is not None:
        draft.sub_minimums[sub] = best_minimum


def _clamp(integers: Tensor, bounds: tuple[int, int] | None) -> Tensor:
    return integers if bounds is None else integers.clamp_(*bounds)
