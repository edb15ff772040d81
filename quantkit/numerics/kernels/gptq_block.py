"""Error-compensated rounding of a block of columns in one launch.

Torch needs half a dozen launches for each column. Here a program takes some rows and holds all
columns of the block for them in registers, from the first load to the last store. The same loop in
other toolkits: `_gptq_block_triton.py` of GPTQModel and `gptq_triton.py` of llm-compressor, both of
which keep rows in registers and pick a column out of them by a masked sum, as is done here.

All arithmetic is float32, rounded as IEEE 754 says; there is no TF32, since there is no matrix
product. `addcmul` and `addr` round once, as torch's do with their vector instructions, so codes are
equal to torch's bit for bit but where its last few elements of a row take another path.
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
"""Of a program: one for each thread of a warp; 128 columns of them take 16 KiB."""


def round_columns(
    block: Tensor,
    target: Tensor,
    lower: Tensor,
    steps: Tensor,
    offsets: Tensor | None,
    scheme: CodeSet,
    errors: Tensor,
) -> None:
    """Round the columns of one block from the last to the first.

    Args:
        block: original weights [B, O] in row units; like all others float32.
        target: the weights plus what makes up for the columns already rounded; becomes codes less
            zero points.
        lower: unit lower triangle [B, B].
        steps: scales [B, O] in row units; offsets: zero points [B, O] or None.
        errors: [B, O], receives original minus dequantized.
    """
    size, rows = target.shape
    rounding, table = rounding_of(scheme, target.device)
    with torch.cuda.device_of(target), written_in_place(target, errors) as (values, found):
        _round_rows[(triton.cdiv(rows, _ROWS),)](
            block.contiguous(),
            values,
            lower.contiguous(),
            steps.contiguous(),
            steps if offsets is None else offsets.contiguous(),
            found,
            table,
            size,
            rows,
            **rounding,
            SHIFTED=offsets is not None,
            COLUMNS=power_of_two(size),
            ROWS=_ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )


@kernel
def _round_rows(
    block: tl.tensor,
    target: tl.tensor,
    lower: tl.tensor,
    steps: tl.tensor,
    offsets: tl.tensor,
    errors: tl.tensor,
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
    here = (column < size)[:, None] & inside[None, :]
    held = tl.load(target + column[:, None] * rows + row[None, :], mask=here, other=0.0)
    last = (size - 1) * rows + row
    # Loaded a column ahead, since each waits for the memory.
    original = tl.load(block + last, mask=inside, other=0.0)
    step = tl.load(steps + last, mask=inside, other=1.0)
    offset = tl.load(offsets + last, mask=inside, other=0.0) if SHIFTED else tl.zeros_like(step)
    for back in range(size):
        at = size - 1 - back
        place = at * rows + row
        before = inside & (place >= rows)
        original_before = tl.load(block + place - rows, mask=before, other=0.0)
        step_before = tl.load(steps + place - rows, mask=before, other=1.0)
        compensation = tl.load(lower + at * size + column, mask=column < at, other=0.0)
        # A sum of bits with zeros, which keeps the sign of a zero.
        chosen = tl.where((column == at)[:, None], held.to(tl.int32, bitcast=True), 0)
        value = tl.div_rn(tl.sum(chosen, axis=0).to(tl.float32, bitcast=True), step)
        value = round_value(value, offset, low, high, table, KIND, ENTRIES)
        error = tl.fma(-value, step, original)
        tl.store(target + place, value, mask=inside)
        tl.store(errors + place, error, mask=inside)
        moved = tl.fma(
            tl.broadcast_to(compensation[:, None], (COLUMNS, ROWS)),
            tl.broadcast_to(error[None, :], (COLUMNS, ROWS)),
            held,
        )
        held = tl.where((column < at)[:, None], moved, held)
        if SHIFTED:
            offset = tl.load(offsets + place - rows, mask=before, other=0.0)
        original, step = original_before, step_before
