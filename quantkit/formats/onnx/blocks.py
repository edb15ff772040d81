"""Weights in packed blocks of columns: MatMulNBits, GatherBlockQuantized and QMoE.

The layouts are those of ONNX Runtime's contrib operators (docs/ContribOperators.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.errors import ArtifactError
from quantkit.formats.onnx.tensors import OnnxTensor
from quantkit.formats.onnx.wiring import Wiring, name_layer, show

Layout = Literal["blocks", "rows", "columns"]
"""How codes lie: [O, I]; transposed, [I, O]; or packed along I in blocks of columns."""
Inputs = Literal["float", "dynamic", "static"]
"""Whether inputs are rounded, too, and whether their scale is computed or stored."""


@dataclass(frozen=True)
class OnnxLayer:
    """One weight that is stored in codes, and what decodes it."""

    name: str
    operator: str
    """The operator that reads it; `QDQ` for DequantizeLinear in front of one."""
    weight: OnnxTensor
    scale: OnnxTensor | None
    """None: it is not stored where it is looked for."""
    zero_point: OnnxTensor | None
    bits: int
    group_size: int | None
    """Columns that share a scale; None: see the shape of the scale."""
    shape: tuple[int, ...]
    """Of the weight, [O, I]; of convolutions and experts, as it is."""
    layout: Layout
    inputs: Inputs
    accuracy_level: int | None = None

    @property
    def sharing(self) -> str:
        """What shares a scale, in the words of `InspectedLayer`."""
        if self.scale is None:
            return "none"
        if self.group_size is not None:
            return "group"
        return "tensor" if self.scale.count == 1 else "channel"

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[OnnxTensor, ...]:
        """All tensors of the layer."""
        found = (self.weight, self.scale, self.zero_point)
        return tuple(part for part in found if part is not None)


def read_blocks(node: Any, wiring: Wiring) -> OnnxLayer:
    """Describe the weight of a MatMulNBits or GatherBlockQuantized: each block has a scale.

    Raises:
        ArtifactError: its attributes and tensors do not fit together.
    """
    product = node.op_type == "MatMulNBits"
    weight, scale = wiring.read(node, 1 if product else 0), wiring.read(node, 2)
    called = f"node {show(node.name) or node.op_type} ({node.op_type})"
    if weight is None or scale is None:
        raise ArtifactError(f"{called}: codes or scales are not stored in the file")
    numbers = {a.name: a.i for a in node.attribute if a.type == 2}
    packed = weight.kind.bits
    bits = int(numbers.get("bits", 4)) if packed == 8 else packed
    block = int(numbers.get("block_size", 0 if product else 128))
    if not 1 <= bits <= 8 or not 1 <= block <= 1 << 20:
        raise ArtifactError(f"{called}: {bits} bits in blocks of {block} are no layout")
    if product:
        shape = (int(numbers.get("N", 0)), int(numbers.get("K", 0)))
    else:
        # Codes that MatMulNBits reads, too, are reshaped for one of both.
        own = node.input[0] == weight.name
        matrix = len(weight.shape) == 2 or (len(weight.shape) == 3 and not own)
        if not matrix or numbers.get("quantize_axis", 1) not in (1, -1):
            raise ArtifactError(f"{called}: blocks of anything but columns are not read")
        rows = weight.shape[0]
        shape = (rows, weight.count * packed // bits // rows if rows else 0)
    if min(shape) < 1:
        raise ArtifactError(f"{called}: the shape {list(shape)} is no matrix")
    layer = OnnxLayer(
        name=name_layer(node, weight.name, wiring),
        operator=node.op_type,
        weight=weight,
        scale=scale,
        zero_point=wiring.read(node, 3),
        bits=bits,
        group_size=block,
        shape=shape,
        layout="blocks",
        inputs="float",
        accuracy_level=int(numbers.get("accuracy_level", 0)) if product else None,
    )
    _check_sizes(layer, called)
    return layer


def _check_sizes(layer: OnnxLayer, called: str) -> None:
    """Compare the tensors of blocks with the shape of the weight.

    Raises:
        ArtifactError: they hold more or less than it needs.
    """
    (rows, columns), block = layer.shape, layer.group_size or 1
    blocks = -(-columns // block)
    product = layer.operator == "MatMulNBits"
    width = blocks * (-(-block * layer.bits // 8)) if product else -(-columns * layer.bits // 8)
    scales = layer.scale.count if layer.scale is not None else 0
    checks = [
        ("bytes of codes", layer.weight.size, rows * width),
        ("scales", scales, rows * blocks),
    ]
    zero_point = layer.zero_point
    if zero_point is not None:
        whole = zero_point.kind.floating or zero_point.kind.bits < 8
        needed = rows * blocks if whole else rows * -(-blocks * layer.bits // 8)
        checks.append(("zero points", zero_point.count, needed))
    for what, found, needed in checks:
        if found != needed:
            raise ArtifactError(
                f"{called}: {found} {what}, but a weight of {list(layer.shape)} with {layer.bits} "
                f"bits in blocks of {block} needs {needed}"
            )


def read_experts(node: Any, wiring: Wiring) -> Iterator[OnnxLayer]:
    """Yield the stacks of experts' weights of a QMoE.

    Raises:
        ArtifactError: it has bits that no layout has.
    """
    numbers = {a.name: a.i for a in node.attribute if a.type == 2}
    bits = int(numbers.get("expert_weight_bits", 4))
    for position in (2, 5, 8):
        weight, scale = wiring.read(node, position), wiring.read(node, position + 1)
        if weight is None:
            continue
        if bits not in (2, 4, 8) or not weight.shape:
            raise ArtifactError(f"node {show(node.name)} (QMoE): {bits} bits are no layout")
        shape = (*weight.shape[:-1], weight.shape[-1] * weight.kind.bits // bits)
        name = name_layer(node, weight.name, wiring)
        block = int(numbers.get("block_size", 0)) or None
        yield OnnxLayer(name, "QMoE", weight, scale, None, bits, block, shape, "rows", "float")
