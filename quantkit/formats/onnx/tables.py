"""Embeddings and output layers in four or eight bits, rounded without data."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.affine import quantize
from quantkit.numerics.scale_search import search_scales
from quantkit.records import QuantizedLayer
from quantkit.schemes import ONNX_TABLE_BLOCK, SCHEMES

_ELEMENTS = 1 << 22
"""Of a table, rounded at a time."""


def round_table(name: str, table: Tensor, bits: int, scale_dtype: torch.dtype) -> QuantizedLayer:
    """Round a table [V, D] in blocks of 32 columns, symmetrically.

    Each block has the scale of a grid around absmax that leaves the least squared error.

    Raises:
        ValueError: 32 does not divide D.
    """
    scheme = SCHEMES["w4a16" if bits == 4 else "w8a16"]
    even = torch.ones(table.shape[1])
    codes, scales = [], []
    for rows in table.split(max(1, _ELEMENTS // table.shape[1])):
        weight = rows.float()
        scale, _ = search_scales(weight, scheme, ONNX_TABLE_BLOCK, scale_dtype, even)
        codes.append(quantize(weight, scale, None, scheme))
        scales.append(scale)
    return QuantizedLayer(name, scheme, ONNX_TABLE_BLOCK, torch.cat(codes), torch.cat(scales), None)
