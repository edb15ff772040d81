"""The two loops over the columns of a block, in which each step waits for the one before it.

Nothing else of a solver cannot be a matmul. A torch operation a step costs more than its arithmetic
where rows are few, and reads the whole block from memory where they are many. So on a processor
numba compiles both loops for integer codes, if it is installed: a few rows at a time stay in the
core's cache for all columns. The results agree up to the rounding of a fused multiply and add.

Shapes: B columns of a block, O output features.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.numerics import kernels
from quantkit.numerics.affine import CodeSet, integer_limits, round_values
from quantkit.numerics.threads import share_out

_FINITE = (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
_FEWEST_ROWS = 128
"""Fewer are done before numba is imported."""

_ROWS_A_THREAD = 256
"""So few rows take about as long as starting a thread."""

Floats = NDArray[np.float32]


def round_columns(
    block: Tensor,
    target: Tensor,
    lower: Tensor,
    steps: Tensor,
    offsets: Tensor | None,
    scheme: CodeSet,
    errors: Tensor,
) -> None:
    """Round the columns of one block from the last to the first (arXiv 2507.18553).

    Args:
        block: original weights float32 [B, O] in row units.
        target: float32 [B, O], the weights plus what makes up for the columns already rounded;
            becomes codes less zero points.
        lower: unit lower triangle float32 [B, B].
        steps: scales [B, O] in row units; offsets: zero points [B, O] or None.
        errors: float32 [B, O], receives original minus dequantized.
    """
    if kernels.kernels_available(target.device):
        kernels.round_columns(block, target, lower, steps, offsets, scheme, errors)
        return
    limits = integer_limits(scheme)
    if limits is not None and _compiles(target, errors):
        from quantkit.numerics.columns_compiled import round_columns as compiled

        arrays = (_contiguous(block), _contiguous(lower), _contiguous(steps))
        run = partial(compiled, target.numpy(), errors.numpy(), *arrays, _array(offsets), *limits)
        share_out(run, target.shape[1], target.shape[1] // _ROWS_A_THREAD)
        return
    for column in range(len(block) - 1, -1, -1):
        value, step, error = target[column], steps[column], errors[column]
        offset = None if offsets is None else offsets[column]
        round_values(value.div_(step), scheme, offset)
        torch.addcmul(block[column], value, step, value=-1, out=error)
        if column:
            target[:column].addr_(lower[column, :column], error)


def descend_columns(
    values: Tensor,
    steps: Tensor,
    offset: Tensor | None,
    residual: Tensor,
    inner: Tensor,
    scheme: CodeSet,
) -> None:
    """Move each value of a block to its best one, column after column, in place.

    With R = E H the best value of a column is R_j / (H_jj step) away from its present one
    (coordinate descent, arXiv 2309.01885).

    Args:
        values: codes less zero points, float32 [B, O].
        steps: float32 [S, O], not zero, each for B / S columns side by side; offset: zero points
            [S, O] or None.
        residual: R float32 [B, O], follows. inner: the block of H, [B, B].
    """
    on_device, limits = kernels.kernels_available(values.device), integer_limits(scheme)
    if not on_device and limits is not None and _compiles(values, residual):
        from quantkit.numerics.columns_compiled import descend_columns as compiled

        arrays = (values.numpy(), residual.numpy(), _contiguous(steps), _contiguous(inner))
        run = partial(compiled, *arrays, _array(offset), *limits)
        share_out(run, values.shape[1], values.shape[1] // _ROWS_A_THREAD)
        return
    columns = len(values) // len(steps)
    if columns > 1:
        steps = steps.repeat_interleave(columns, 0)
        offset = None if offset is None else offset.repeat_interleave(columns, 0)
    diagonal = inner.diagonal().unsqueeze(1)
    # A column that was never active has no best value: its codes stay.
    gain = torch.where(diagonal > 0, 1.0 / (diagonal * steps), torch.zeros_like(steps))
    # Finite also where a step is tiny beside its row, so that nothing times it is nothing.
    gain.clamp_(*_FINITE)
    if on_device:
        kernels.descend_columns(values, steps, gain, offset, residual, inner, scheme)
        return
    new = torch.empty_like(values[0])
    for column in range(len(values)):
        value = values[column]
        torch.addcmul(value, residual[column], gain[column], out=new)
        round_values(new, scheme, None if offset is None else offset[column])
        change = value.sub_(new).mul_(steps[column])
        residual.addr_(inner[column], change)
        value.copy_(new)


def missing_compiler() -> str | None:
    """Say what is slower without numba; None where it is installed."""
    if find_spec("numba") is not None:
        return None
    return (
        "numba is not installed, so the loops over columns and the search of scales take several "
        'times as long, and second moments longer: pip install "quantkit[fast]"'
    )


def _compiles(*changed: Tensor) -> bool:
    """Whether to leave the loop over tensors [B, O] that change in place to numba."""
    if changed[0].shape[1] < _FEWEST_ROWS or find_spec("numba") is None:
        return False
    return all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in changed)


def _contiguous(tensor: Tensor) -> Floats:
    return tensor.contiguous().numpy()


def _array(tensor: Tensor | None) -> Floats | None:
    return None if tensor is None else _contiguous(tensor)
