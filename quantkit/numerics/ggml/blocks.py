"""Codes and scales of ggml's block types, and what they decode to.

Shapes: R rows, I columns, B = I / block super-blocks or blocks, S = I / sub_block sub-blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType


@dataclass(frozen=True)
class GgmlBlocks:
    """Rows in a block type, before they are packed into bytes.

    codes: int8 [R, I], within the type's `codes`; indices of its `values` where it has those.
    d: float16 [R, B]. m: float16 [R, B], `dmin` of super-blocks, else the minimum itself; None for
    types without one. sub_scales, sub_minimums: int8 [R, S] where the type has such integers, else
    None.
    """

    type: GgmlType
    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    sub_scales: Tensor | None = None
    sub_minimums: Tensor | None = None

    def scales(self) -> Tensor:
        """Return the scale of each sub-block, float32 [R, S]."""
        d = self.d.float()
        if self.sub_scales is None:
            return d
        return _repeat(d, self.sub_scales) * self.sub_scales.float()

    def minimums(self) -> Tensor | None:
        """Return what each sub-block adds to its weights, float32 [R, S]; None for nothing."""
        if self.m is None:
            return None
        m = self.m.float()
        if self.sub_minimums is None:
            return m
        return -_repeat(m, self.sub_minimums) * self.sub_minimums.float()

    def values(self) -> Tensor:
        """Return what the codes stand for, float32 [R, I]."""
        if not self.type.values:
            return self.codes.float()
        table = torch.tensor(self.type.values, dtype=torch.float32, device=self.codes.device)
        return table[self.codes.long()]

    def dequantize(self) -> Tensor:
        """Return the weights float32 [R, I], in the operations of ggml's own dequantization."""
        values = self.values().unflatten(1, (-1, self.type.sub_block))
        weights = self.scales().unsqueeze(2) * values
        minimums = self.minimums()
        if minimums is not None:
            weights += minimums.unsqueeze(2)
        return weights.flatten(1)


def _repeat(per_block: Tensor, per_sub_block: Tensor) -> Tensor:
    return per_block.repeat_interleave(per_sub_block.shape[1] // per_block.shape[1], dim=1)
