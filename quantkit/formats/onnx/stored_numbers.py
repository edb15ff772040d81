"""Whether the numbers in an ONNX file can be right: finite, in range, not all the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from quantkit.errors import ArtifactError
from quantkit.formats.onnx.blocks import OnnxLayer
from quantkit.formats.onnx.container import OnnxFile
from quantkit.formats.onnx.decoding import read_codes, read_zero_points
from quantkit.formats.onnx.tensors import OnnxTensor, iterate_values, read_floats
from quantkit.formats.onnx.wiring import show

_FEW_CODES = 64
"""Codes of a weight so small that they may well be equal."""


def check_numbers(file: OnnxFile, layers: Iterable[OnnxLayer]) -> Iterator[str]:
    """Read every number of a file and yield what cannot be, one line each."""
    seen: set[int] = set()
    for layer in layers:
        seen.update(id(part) for part in (layer.scale, layer.zero_point) if part is not None)
        try:
            yield from _check_layer(layer)
        except ArtifactError as error:
            yield str(error)
    for tensor in file.tensors.values():
        if tensor.kind.floating and id(tensor) not in seen:
            try:
                yield from _check_finite(tensor)
            except ArtifactError as error:
                yield str(error)


def _check_layer(layer: OnnxLayer) -> Iterator[str]:
    """Look at the parts of a quantized layer.

    Raises:
        ArtifactError: a data file changed.
    """
    where = f"layer {layer.name}"
    if layer.weight.count > _FEW_CODES and _is_constant(layer):
        yield f"{where}: all codes are equal, nothing of the weight is left"
    if layer.scale is None:
        yield f"{where}: its scales are not stored where they are read"
    else:
        if not layer.scale.kind.floating:
            yield f"{where}: its scales are {layer.scale.kind.name}, no floating-point numbers"
        scale = read_floats(layer.scale)
        # ONNX Runtime's own 4-bit weights have a scale of the sign of a block's largest number,
        # and none where all numbers of a block are zero.
        blocks = layer.layout == "blocks"
        sound = np.isfinite(scale) & ((scale > 0) | blocks)
        wrong = scale.size - int(sound.sum())
        if wrong:
            what = "finite" if blocks else "finite and positive"
            yield f"{where}: {wrong} of {scale.size} scales are not {what}"
        elif not scale.any():
            yield f"{where}: all scales are zero"
    yield from _check_counts(layer)
    zero_points = read_zero_points(layer)
    if zero_points is not None and zero_points.dtype.kind == "f":
        wrong = int((~((zero_points >= 0) & (zero_points < 1 << layer.bits))).sum())
        if wrong:
            yield f"{where}: {wrong} zero points are outside of {layer.bits} bits"
    if layer.zero_point is not None and layer.layout != "blocks":
        codes, zeros = layer.weight.kind.name, layer.zero_point.kind.name
        if codes != zeros:
            yield f"{where}: its codes are {codes}, its zero points {zeros}"


def _check_counts(layer: OnnxLayer) -> Iterator[str]:
    """Compare the numbers of scales and zero points with the weight; those of blocks are known."""
    if layer.layout == "blocks" or layer.operator == "QMoE":
        return
    columns = layer.layout == "columns"
    outputs = layer.weight.shape[-1 if columns else 0]
    allowed = {1, outputs}
    if layer.group_size is not None:
        axis = 0 if columns else -1
        blocks = -(-layer.weight.shape[axis] // layer.group_size)
        allowed.add(layer.weight.count // max(layer.weight.shape[axis], 1) * blocks)
    for what, part in (("scales", layer.scale), ("zero points", layer.zero_point)):
        if part is not None and part.count not in allowed:
            yield f"layer {layer.name}: {part.count} {what} for {outputs} rows of the weight"


def _is_constant(layer: OnnxLayer) -> bool:
    first = None
    for values in iterate_values(layer.weight):
        if first is None:
            first = values[0]
        if (values != first).any():
            return False
    # Equal bytes may still hold codes that differ.
    return layer.layout != "blocks" or bool((codes := read_codes(layer)).min() == codes.max())


def _check_finite(tensor: OnnxTensor) -> Iterator[str]:
    """Look for NaN and infinity; a mask of nothing but zeros and -infinity is none of a model's.

    Raises:
        ArtifactError: the data file changed.
    """
    missing = infinite = other = 0
    for values in iterate_values(tensor):
        missing += int(np.isnan(values).sum())
        infinite += int((values == np.inf).sum())
        low = values == -np.inf
        infinite += int(low.sum())
        other += int((~low & (values != 0)).sum())
    mask = infinite and not other
    if missing or (infinite and not mask):
        yield f"tensor {show(tensor.name)} holds {missing} NaN and {infinite} infinite values"
