"""A GGUF file against the checkpoint that it was made from: what is equal, and how far the rest.

Scales that were folded from one layer into another are not taken out: such layers are told as far
from the base as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.formats.comparison import ComparedLayer, Comparison
from quantkit.formats.gguf.container import GgufFile
from quantkit.formats.gguf.dequantizing import decode_tensor, plan_dequantizing
from quantkit.formats.gguf.tensors import GgufTensor

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
    for tensor in plan.tensors:
        error = _measure(file, base, tensor)
        source = str(tensor.source)
        if file.tensors[tensor.name].kind.quantized:
            layers.append(ComparedLayer(source.removesuffix(".weight"), error))
        elif error:
            changed.append(source)
    equal = len(plan.tensors) - len(layers) - len(changed)
    bits = {
        str(tensor.source).removesuffix(".weight"): _count_bits(file, tensor)
        for tensor in plan.tensors
    }
    problems = tuple(_find_far(layers, bits))
    return Comparison(base.source.name, tuple(layers), tuple(changed), equal, problems)


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


def _sum_squares(values: Tensor) -> float:
    return float(values.double().square().sum())


def _count_bits(file: GgufFile, tensor: GgufTensor) -> int:
    low, high = file.tensors[tensor.name].kind.codes
    return (high - low).bit_length()


def _find_far(layers: list[ComparedLayer], bits: dict[str, int]) -> Iterator[str]:
    for layer in layers:
        limit = _LIMITS.get(bits[layer.name], _USUAL_LIMIT)
        if not layer.relative_error <= limit:
            yield (
                f"layer {layer.name} differs from the base's by {layer.relative_error:.3g} of its "
                f"norm, which no rounding to {bits[layer.name]} bits does (up to {limit:g})"
            )
