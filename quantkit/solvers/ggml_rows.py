"""Rows of ggml blocks: taken, put back, chosen; codes of values.

Shapes: R rows, I columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.ggml.blocks import GgmlBlocks


def copy_blocks(blocks: GgmlBlocks) -> GgmlBlocks:
    """Return a copy that shares no memory."""
    return _each(blocks, torch.Tensor.clone)


def take_rows(blocks: GgmlBlocks, rows: Tensor) -> GgmlBlocks:
    """Return some rows, int64 [r], in that order."""
    return _each(blocks, lambda tensor: tensor.index_select(0, rows))


def put_rows(blocks: GgmlBlocks, rows: Tensor, new: GgmlBlocks) -> None:
    """Write new rows to the places int64 [r]."""
    for old, other in zip(_tensors(blocks), _tensors(new), strict=True):
        old.index_copy_(0, rows, other)


def choose_rows(rows: Tensor, blocks: GgmlBlocks, others: GgmlBlocks) -> GgmlBlocks:
    """Return `blocks` where `rows`, bool [R], holds, else `others`."""
    result, places = copy_blocks(others), torch.nonzero(rows).squeeze(1)
    put_rows(result, places, take_rows(blocks, places))
    return result


def join_rows(parts: Sequence[GgmlBlocks]) -> GgmlBlocks:
    """Return the rows of all parts, which are of one type, one after the other."""

    def join(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return GgmlBlocks(
        type=parts[0].type,
        codes=torch.cat([part.codes for part in parts]),
        d=torch.cat([part.d for part in parts]),
        m=join([part.m for part in parts]),
        sub_scales=join([part.sub_scales for part in parts]),
        sub_minimums=join([part.sub_minimums for part in parts]),
    )


def values_to_codes(values: Tensor, kind: GgmlType) -> Tensor:
    """Return the codes int8 that stand for values as `round_values` makes them, any shape."""
    if kind.values:
        table = torch.tensor(kind.values, dtype=torch.float32, device=values.device)
        values = torch.searchsorted(table, values.float().contiguous())
    return values.to(torch.int8)


def _tensors(blocks: GgmlBlocks) -> list[Tensor]:
    every = (blocks.codes, blocks.d, blocks.m, blocks.sub_scales, blocks.sub_minimums)
    return [tensor for tensor in every if tensor is not None]


def _each(blocks: GgmlBlocks, change: Callable[[Tensor], Tensor]) -> GgmlBlocks:
    def changed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    return replace(
        blocks,
        codes=change(blocks.codes),
        d=change(blocks.d),
        m=changed(blocks.m),
        sub_scales=changed(blocks.sub_scales),
        sub_minimums=changed(blocks.sub_minimums),
    )
