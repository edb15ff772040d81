"""The searches of K-quants over the rows of a tensor, by torch: on any device.

Tensors of a search are [P, S, N]: places of a sub-block, sub-blocks of a super-block, super-blocks
of all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics import kernels
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.encode_k_search import (
    Search,
    affine_grid,
    descend_symmetric,
    nearest_integers,
    search_affine,
    search_symmetric,
    square_root,
    sum_in_order,
)
from quantkit.numerics.ggml.packing_k import SUPER_BLOCK


def search(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Search:
    """Search scales, minimums and codes for float32 [R, I], under an importance matrix or none."""
    x = _lay_out(kind, weight)
    cost = None if importance is None else _lay_out(kind, importance.expand_as(weight))
    if kind.name == "Q3_K" and cost is None:
        scale, codes = descend_symmetric(x, -kind.codes[0])
        return Search(scale, _in_place(codes, weight))
    weights = _cost_of_errors(kind, x, cost)
    sums = None if cost is None else sum_in_order(weights)
    on_kernels = kernels.kernels_available(x.device)
    if kind.has_minimum:
        grid = affine_grid(kind, plain=cost is None)
        find_range = kernels.search_affine if on_kernels else search_affine
        scale, minimum, codes = find_range(x, weights, grid)
        return Search(scale, _in_place(codes, weight), minimum, sums)
    find_scale = kernels.search_symmetric if on_kernels else search_symmetric
    scale, codes = find_scale(x, weights, -kind.codes[0])
    return Search(scale, _in_place(codes, weight), weights=sums)


def round_codes(blocks: GgmlBlocks, weight: Tensor) -> Tensor:
    """Return all codes rounded anew, int8 [R, I], those of the search where a scale is zero."""
    kind = blocks.type
    x = weight.unflatten(1, (-1, kind.sub_block))
    scale, minimum = blocks.scales().unsqueeze(2), blocks.minimums()
    shifted = x if minimum is None else x - minimum.unsqueeze(2)
    codes = nearest_integers(shifted / scale).clamp_(*kind.codes).to(torch.int8)
    found = blocks.codes.view_as(codes)
    return torch.where(scale == 0, found, codes).flatten(1)


def _lay_out(kind: GgmlType, values: Tensor) -> Tensor:
    """Bring [R, I] into the order of the search, [P, S, N]."""
    by_super_block = values.reshape(-1, SUPER_BLOCK // kind.sub_block, kind.sub_block)
    return by_super_block.permute(2, 1, 0).contiguous()


def _in_place(codes: Tensor, weight: Tensor) -> Tensor:
    """Undo `_lay_out`, for codes."""
    return codes.to(torch.int8).permute(2, 1, 0).reshape(weight.shape)


def _cost_of_errors(kind: GgmlType, x: Tensor, cost: Tensor | None) -> Tensor:
    """Return what the search takes a squared error of each weight to cost, [P, S, N]."""
    squares = x * x
    if kind.name == "Q6_K":
        return squares if cost is None else cost
    if cost is not None:
        energy = sum_in_order(squares.transpose(0, 1).flatten(0, 1))
        doubled = energy if kind.name == "Q2_K" else 2 * energy
        return cost * square_root(doubled / SUPER_BLOCK + squares)
    if kind.name == "Q2_K":
        return x.abs()
    return square_root(sum_in_order(squares) / kind.sub_block) + x.abs()
