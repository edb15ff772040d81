"""Polishing ggml blocks: no step raises the loss, and what was spoilt is mended."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.solvers.ggml_refit import polish_blocks
from quantkit.solvers.ggml_rows import choose_rows, copy_blocks, put_rows, take_rows
from quantkit.solvers.ggml_scales import search_blocks
from tests.solvers.cases import exact_losses, make_moment, make_weight
from tests.solvers.test_ggml_scales import QUANTIZED, make_grid


def losses_of(weight: Tensor, blocks: GgmlBlocks, moment: Tensor) -> Tensor:
    """e H e^T of each row, float64."""
    return exact_losses(weight.double() - blocks.dequantize().double(), moment)


@pytest.mark.parametrize("name", QUANTIZED)
def test_each_sweep_lowers_the_loss_of_every_row(name: str) -> None:
    """From rounding to nearest, for whole super-blocks and for a part of the columns treated."""
    kind = GGML_TYPES[name]
    columns = 512 if kind.block == 256 else 288
    weight, moment = make_weight(12, columns, 0), make_moment(columns, 1)
    blocks = search_blocks(weight, kind, torch.ones(columns))
    before = losses_of(weight, blocks, moment)
    for _ in range(3):
        blocks = polish_blocks(weight, blocks, moment, 0.0, 1)
        after = losses_of(weight, blocks, moment)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    first = losses_of(weight, search_blocks(weight, kind, torch.ones(columns)), moment)
    assert float(before.sum()) < 0.8 * float(first.sum())


PARTS = [
    (name, part)
    for name in QUANTIZED
    for part in ("codes", "d", "m", "sub_scales", "sub_minimums")
    if getattr(make_grid(GGML_TYPES[name], 1, 256, 0), part) is not None
]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_what_was_spoilt_is_mended(name: str, part: str) -> None:
    """Weights on a grid, uncorrelated inputs: a sweep or two find what hits all of them."""
    kind = GGML_TYPES[name]
    grid = make_grid(kind, 8, 256, 0)
    weight, moment = grid.dequantize(), make_moment(256, 2).diagonal().diag()
    new = getattr(grid, part).clone()
    if part in ("d", "m"):
        # The next float16.
        new.view(torch.int16).add_(1)
    else:
        # The first is the largest of a super-block, or a code with room above it.
        new[:, 0] += 1 if float(new[0, 0]) == min(kind.codes) or float(new[0, 0]) < 0 else -1
    spoilt = replace(grid, **{part: new})

    found = polish_blocks(weight, spoilt, moment, 0.0, 3)

    before, after = (losses_of(weight, each, moment) for each in (spoilt, found))
    assert float(before.min()) > 0
    assert float(after.sum()) < 1e-6 * float(before.sum())


def test_columns_without_any_input_stay_as_they_are() -> None:
    """Their codes have no best place."""
    kind, weight = GGML_TYPES["Q4_0"], make_weight(4, 64, 0)
    moment = torch.zeros(64, 64)
    moment[:32, :32] = make_moment(32, 0)
    blocks = search_blocks(weight, kind, torch.ones(64))

    found = polish_blocks(weight, blocks, moment, 0.0, 2)

    assert torch.equal(found.codes[:, 32:], blocks.codes[:, 32:])
    assert torch.equal(found.d[:, 1], blocks.d[:, 1])


def test_rows_are_taken_and_put_back() -> None:
    """In the order asked for; the others stay."""
    kind = GGML_TYPES["Q2_K"]
    one, other = make_grid(kind, 4, 256, 0), make_grid(kind, 4, 256, 1)

    chosen = choose_rows(torch.tensor([True, False, False, True]), one, other)
    taken = take_rows(one, torch.tensor([3, 0]))
    target = copy_blocks(other)
    put_rows(target, torch.tensor([3, 0]), taken)

    expected = torch.stack([*one.dequantize()[:1], *other.dequantize()[1:3], one.dequantize()[3]])
    assert torch.equal(chosen.dequantize(), expected)
    assert torch.equal(target.dequantize(), expected)
