"""A GGUF file against the checkpoint that it was made from: what is equal, and how far the rest.

Where a scale was folded into what stands in front of a layer, the layer is compared as one of
another format is (`formats/comparison.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.formats.comparison import (
    ComparedLayer,
    Comparison,
    explain_layer,
    find_lonely_layers,
    without_fits,
)
from quantkit.formats.gguf.container import GgufFile
from quantkit.formats.gguf.dequantizing import decode_tensor, plan_dequantizing
from quantkit.formats.gguf.tensors import GgufTensor
from quantkit.formats.table_rows import find_wrong_rows, measure_rows

_LIMITS = {8: 0.1, 2: 0.7}
_USUAL_LIMIT = 0.5
"""Relative error beyond which a tensor cannot be a rounding of the checkpoint's, by bits of codes.
Plain rounding of normal numbers to Q2_K makes 0.3, to Q4_K 0.07, to Q8_0 0.005."""


def compare_gguf(file: GgufFile, base: Checkpoint) -> Comparison:
    """Compare every tensor, decoded.

    Raises:
        ArtifactError: the file is of another model, or has a type that is not decoded.
        CheckpointError: the base is of an architecture that is not built, or damaged.
    """
    plan = plan_dequantizing(file, base)
    layers: list[ComparedLayer] = []
    changed: list[str] = []
    tables: list[str] = []
    ratios: dict[str, Tensor] = {}
    # Norms first, since they tell what the layers behind them were multiplied by.
    for tensor in sorted(plan.tensors, key=lambda each: len(each.shape)):
        error = _measure(file, base, tensor)
        source = str(tensor.source)
        if error and tensor.block is None and len(tensor.shape) == 2:
            tables += _check_table(file, base, tensor)
        if not file.tensors[tensor.name].kind.quantized:
            if error:
                changed.append(source)
            if error and len(tensor.shape) == 1:
                ratios[source] = _find_ratio(file, base, tensor)
            continue
        layer = ComparedLayer(source.removesuffix(".weight"), error)
        # What is outside of the blocks is large, and nothing is folded into it.
        if tensor.block is not None or error > _USUAL_LIMIT:
            layer = _explain(file, base, tensor, ratios)
        layers.append(layer)
    equal = len(plan.tensors) - len(layers) - len(changed)
    bits = {
        str(tensor.source).removesuffix(".weight"): _count_bits(file, tensor)
        for tensor in plan.tensors
    }
    problems = (*_find_far(layers, bits), *tables, *find_lonely_layers(layers, changed))
    return Comparison(base.source.name, without_fits(layers), tuple(changed), equal, problems)


def _measure(file: GgufFile, base: Checkpoint, tensor: GgufTensor) -> float:
    """Return ||W' - W|| / ||W||, 0 where both are the same."""
    expected = read_tensor(base, str(tensor.source)).reshape(-1)
    squares = distance = 0.0
    place = 0
    for values in decode_tensor(file, tensor):
        part = expected[place : place + values.numel()].float()
        place += values.numel()
        squares += _sum_squares(part)
        distance += _sum_squares(values.reshape(-1) - part)
    if not distance:
        return 0.0
    return math.sqrt(distance / squares) if squares else math.inf


def _check_table(file: GgufFile, base: Checkpoint, tensor: GgufTensor) -> Iterator[str]:
    """Look at the rows of an embedding or an output layer, a piece at a time."""
    weight, place = read_tensor(base, str(tensor.source)), 0
    rows = []
    for values in decode_tensor(file, tensor):
        rows.append(measure_rows(values, weight[place : place + len(values)]))
        place += len(values)
    problem = find_wrong_rows(str(tensor.source), torch.cat(rows))
    if problem is not None:
        yield problem


def _find_ratio(file: GgufFile, base: Checkpoint, tensor: GgufTensor) -> Tensor:
    """Return a norm's weight in the base divided by that in the file, as they act; float32 [I]."""
    (stored,) = decode_tensor(file, tensor)
    weight = read_tensor(base, str(tensor.source)).float() + tensor.added
    ratio = weight / (stored.reshape(-1) + tensor.added)
    # A weight of zero tells nothing of what it was divided by.
    return torch.nan_to_num(ratio, nan=1.0, posinf=1.0, neginf=1.0)


def _explain(
    file: GgufFile, base: Checkpoint, tensor: GgufTensor, ratios: Mapping[str, Tensor]
) -> ComparedLayer:
    """Compare a layer with the norms of its block that changed."""
    source = str(tensor.source)
    found = torch.cat(list(decode_tensor(file, tensor)))
    weight = read_tensor(base, source).float()
    prefix = f".{tensor.block}."
    near = {
        norm: ratio
        for norm, ratio in ratios.items()
        if prefix in norm and len(ratio) == weight.shape[1]
    }
    return explain_layer(source.removesuffix(".weight"), found, weight, near)


def _sum_squares(values: Tensor) -> float:
    return float(values.double().square().sum())


def _count_bits(file: GgufFile, tensor: GgufTensor) -> int:
    low, high = file.tensors[tensor.name].kind.codes
    return (high - low).bit_length()


def _find_far(layers: list[ComparedLayer], bits: dict[str, int]) -> Iterator[str]:
    for layer in layers:
        limit = _LIMITS.get(bits[layer.name], _USUAL_LIMIT)
        problem = layer.find_problem(bits[layer.name], limit)
        if problem is not None:
            yield problem
