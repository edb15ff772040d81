"""Coordinate descent on the codes of a block of columns in one launch.

As in `gptq_block`, a program holds the residual of some rows for all columns of the block in
registers. All arithmetic is float32, rounded as IEEE 754 says, and fused where torch fuses it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.numerics.affine import CodeSet
from quantkit.numerics.kernels.device import (
    kernel,
    power_of_two,
    round_value,
    rounding_of,
    written_in_place,
)

_ROWS = 32


def descend_columns(
    values: Tensor,
    steps: Tensor,
    gain: Tensor,
    offset: Tensor | None,
    residual: Tensor,
    inner: Tensor,
    scheme: CodeSet,
) -> None:
    """Move each value of a block [B, O] to its best one, column after column, in place.

    Args:
        values: codes less zero points [B, O]; like all others float32.
        steps: [B, O]; gain: [B, O], the steps that a unit of the residual is worth.
        offset: zero points [B, O] or None.
        residual: R [B, O], follows. inner: the block of H, [B, B].
    """
    size, rows = values.shape
    rounding, table = rounding_of(scheme, values.device)
    with torch.cuda.device_of(values), written_in_place(values, residual) as (codes, rest):
        _descend_rows[(triton.cdiv(rows, _ROWS),)](
            codes,
            steps.contiguous(),
            gain.contiguous(),
            steps if offset is None else offset.contiguous(),
            rest,
            inner.contiguous(),
            table,
            size,
            rows,
            **rounding,
            SHIFTED=offset is not None,
            COLUMNS=power_of_two(size),
            ROWS=_ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )


@kernel
def _descend_rows(
    values: tl.tensor,
    steps: tl.tensor,
    gains: tl.tensor,
    offsets: tl.tensor,
    residual: tl.tensor,
    inner: tl.tensor,
    table: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    KIND: tl.constexpr,  # noqa: N803
    ENTRIES: tl.constexpr,  # noqa: N803
    SHIFTED: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    tile = column[:, None] * rows + row[None, :]
    here = (column < size)[:, None] & inside[None, :]
    held = tl.load(residual + tile, mask=here, other=0.0)
    value = tl.load(values + row, mask=inside, other=0.0)
    step = tl.load(steps + row, mask=inside, other=1.0)
    gain = tl.load(gains + row, mask=inside, other=0.0)
    offset = tl.load(offsets + row, mask=inside, other=0.0) if SHIFTED else tl.zeros_like(step)
    for at in range(size):
        place = at * rows + row
        after = inside & (place + rows < size * rows)
        value_after = tl.load(values + place + rows, mask=after, other=0.0)
        step_after = tl.load(steps + place + rows, mask=after, other=1.0)
        gain_after = tl.load(gains + place + rows, mask=after, other=0.0)
        moment = tl.load(inner + at * size + column, mask=column < size, other=0.0)
        chosen = tl.where((column == at)[:, None], held.to(tl.int32, bitcast=True), 0)
        best = tl.fma(tl.sum(chosen, axis=0).to(tl.float32, bitcast=True), gain, value)
        best = round_value(best, offset, low, high, table, KIND, ENTRIES)
        change = (value - best) * step
        tl.store(values + place, best, mask=inside)
        held = tl.fma(
            tl.broadcast_to(moment[:, None], (COLUMNS, ROWS)),
            tl.broadcast_to(change[None, :], (COLUMNS, ROWS)),
            held,
        )
        if SHIFTED:
            offset = tl.load(offsets + place + rows, mask=after, other=0.0)
        value, step, gain = value_after, step_after, gain_after
    tl.store(residual + tile, held, mask=here)
