"""Inputs of kernels whose arithmetic is exact, and what torch makes of them, on any device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.affine import CodeSet, round_values
from quantkit.schemes import SCHEMES

CODE_SETS: tuple[CodeSet, ...] = (
    *(SCHEMES[name] for name in ("w4a16", "w4a16_asym", "w8a16", "fp8_dynamic")),
    *(GGML_TYPES[name] for name in ("Q4_K", "Q6_K", "IQ4_NL")),
)


@dataclass(frozen=True)
class Block:
    """A block of columns [B, O] of a weight; see `numerics.columns.round_columns`."""

    block: Tensor
    target: Tensor
    lower: Tensor
    steps: Tensor
    offsets: Tensor | None
    errors: Tensor

    def copy(self) -> Block:
        return replace(self, target=self.target.clone(), errors=self.errors.clone())


def exact_block(
    columns: int, rows: int, scheme: CodeSet, seed: int, device: str | torch.device = "cpu"
) -> Block:
    """Small multiples of powers of two: no product and no sum is rounded, and there are many ties.

    The first row is zero, and the step of the second is the smallest there is.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float().to(device)

    block = draw(-64, 65, columns, rows) / 16
    steps = 2.0 ** draw(-3, 1, columns, rows)
    block[:, :1] = -0.0
    steps[:, 1:2] = torch.finfo(torch.float32).smallest_normal
    # Far from the diagonal there is nothing, so that a long block stays as exact as a short one.
    near = draw(-2, 3, columns, columns).div(8).triu(-8).tril(-1)
    return Block(
        block=block,
        target=block + draw(-4, 5, columns, rows) / 32,
        lower=near + torch.eye(columns, device=device),
        steps=steps,
        offsets=draw(-8, 8, columns, rows) if _shifted(scheme) else None,
        errors=torch.zeros_like(block),
    )


def normal_block(
    columns: int, rows: int, scheme: CodeSet, seed: int, device: str | torch.device = "cpu"
) -> Block:
    """Numbers as weights have them."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(columns, rows, generator=generator)
    lower = (torch.randn(columns, columns, generator=generator) / 20).tril(-1)
    case = exact_block(columns, rows, scheme, seed, device)
    return replace(
        case,
        block=block.to(device),
        target=block.clone().to(device),
        lower=(lower + torch.eye(columns)).to(device),
        steps=(torch.rand(columns, rows, generator=generator) / 4 + 0.05).to(device),
    )


def _shifted(scheme: CodeSet) -> bool:
    return scheme == SCHEMES["w4a16_asym"]


def round_by_torch(case: Block, scheme: CodeSet) -> None:
    """Round the columns one after the other, an operation at a time."""
    for column in range(len(case.block) - 1, -1, -1):
        value, step, error = case.target[column], case.steps[column], case.errors[column]
        offset = None if case.offsets is None else case.offsets[column]
        round_values(value.div_(step), scheme, offset)
        torch.addcmul(case.block[column], value, step, value=-1, out=error)
        if column:
            case.target[:column].addr_(case.lower[column, :column], error)


def descend_by_torch(
    values: Tensor,
    steps: Tensor,
    gain: Tensor,
    offset: Tensor | None,
    residual: Tensor,
    inner: Tensor,
    scheme: CodeSet,
) -> None:
    """Move one value after the other, an operation at a time."""
    for column in range(len(values)):
        new = torch.addcmul(values[column], residual[column], gain[column])
        round_values(new, scheme, None if offset is None else offset[column])
        residual.addr_(inner[column], (values[column] - new) * steps[column])
        values[column] = new


def exact_descent(
    columns: int, rows: int, scheme: CodeSet, seed: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Values, steps, gains, zero points, residual and moment; one column was never active."""
    case = exact_block(columns, rows, scheme, seed, device)
    steps = case.steps.clamp(min=0.125)
    values = round_values(case.block / steps, scheme, case.offsets)
    inner = case.lower.T @ case.lower
    inner.diagonal().fill_(4.0)
    inner[columns // 2], inner[:, columns // 2] = 0.0, 0.0
    residual = case.target - values * steps
    gain = 0.25 / steps
    gain[columns // 2] = 0.0
    return values, steps, gain, case.offsets, residual, inner


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two float32 tensors are equal, signs of zeros included."""
    return torch.equal(ours.contiguous().view(torch.int32), theirs.contiguous().view(torch.int32))


def needed_of_square(size: int, panel: int) -> Tensor:
    """Which elements [I, I] of a sum of squares have to be there."""
    number = torch.arange(size)
    return number.unsqueeze(0) >= (number // panel * panel).unsqueeze(1)


SHAPES = tuple(itertools.product((1, 5, 12), (1, 31, 33)))
"""Columns and rows: no powers of two, fewer and more than a tile has."""
