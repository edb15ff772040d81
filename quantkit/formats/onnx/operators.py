"""The quantized layers of an ONNX graph: which operators read codes, and where their scales lie.

The layouts are those of ONNX (DequantizeLinear, MatMulInteger, QLinearMatMul) and of ONNX Runtime's
contrib operators (docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from quantkit.errors import ArtifactError
from quantkit.formats.onnx.blocks import Inputs, Layout, OnnxLayer, read_blocks, read_experts
from quantkit.formats.onnx.container import OnnxFile
from quantkit.formats.onnx.tensors import OnnxTensor
from quantkit.formats.onnx.wiring import FEW, Wiring, list_readers, name_layer, wire

INTEGERS = frozenset({"UINT8", "INT8", "UINT4", "INT4", "UINT2", "INT2"})
"""Types of codes."""
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
"""Operators that look rows up; QDQ in front of one counts as a product."""
_DIRECT: Mapping[str, tuple[int, int | None, int | None, Layout, Inputs]] = MappingProxyType(
    {
        "MatMulInteger": (1, None, 3, "columns", "dynamic"),
        "ConvInteger": (1, None, 3, "rows", "dynamic"),
        "DynamicQuantizeMatMul": (1, 2, 3, "columns", "dynamic"),
        "MatMulIntegerToFloat": (1, 3, 5, "columns", "dynamic"),
        "QAttention": (1, 4, 7, "columns", "dynamic"),
        "QLinearMatMul": (3, 4, 5, "columns", "static"),
        "QLinearConv": (3, 4, 5, "rows", "static"),
        "QGemm": (3, 4, 5, "columns", "static"),
    }
)
"""Operator -> which inputs are the codes, the scale (None: of what follows), and the zero point."""


@dataclass(frozen=True)
class FoundLayers:
    """What a graph has in codes, and the operators that cannot be made out."""

    layers: tuple[OnnxLayer, ...]
    problems: tuple[str, ...]


def find_layers(file: OnnxFile) -> FoundLayers:
    """Find every weight that is stored in codes; one that is read twice comes once."""
    found: dict[str, OnnxLayer] = {}
    problems: list[str] = []
    for graph in file.graphs:
        wiring = wire(graph)
        for node in graph.nodes:
            try:
                layers = list(_read_node(node, wiring))
            except ArtifactError as error:
                problems.append(str(error))
                continue
            for layer in layers:
                found.setdefault(f"{graph.place}/{layer.weight.name}", layer)
    return FoundLayers(tuple(found.values()), tuple(problems))


def _read_node(node: Any, wiring: Wiring) -> Iterator[OnnxLayer]:
    """Yield what a node reads in codes.

    Raises:
        ArtifactError: its attributes and tensors do not fit together.
    """
    operator = node.op_type
    if operator in ("MatMulNBits", "GatherBlockQuantized"):
        yield read_blocks(node, wiring)
    elif operator == "QMoE":
        yield from read_experts(node, wiring)
    elif operator == "DequantizeLinear":
        yield from _read_pair(node, wiring)
    elif operator == "Gather":
        yield from _read_table(node, wiring)
    elif operator in _DIRECT:
        yield from _read_direct(node, wiring)


def _read_direct(node: Any, wiring: Wiring) -> Iterator[OnnxLayer]:
    """Operators that have an input for each part."""
    codes, scales, zeros, layout, inputs = _DIRECT[node.op_type]
    weight = wiring.read(node, codes)
    if weight is None or weight.kind.name not in INTEGERS or len(weight.shape) < 2:
        return
    if node.op_type == "QGemm" and any(a.name == "transB" and a.i for a in node.attribute):
        layout = "rows"
    scale = wiring.read(node, scales)
    if scales is None and node.output:
        scale = _find_scale(node, weight, wiring)
    shape = weight.shape[::-1] if layout == "columns" and len(weight.shape) == 2 else weight.shape
    zero_point = wiring.read(node, zeros)
    name = name_layer(node, weight.name, wiring)
    bits = weight.kind.bits
    yield OnnxLayer(
        name, node.op_type, weight, scale, zero_point, bits, None, shape, layout, inputs
    )


def _find_scale(node: Any, weight: OnnxTensor, wiring: Wiring) -> OnnxTensor | None:
    """Return what a product of integers is multiplied with, where it is stored.

    The scale of stored inputs may be a factor, too: that of the weight has a number for each
    column, or the beginning of its name.
    """
    columns = weight.shape[-1]
    factors = [each for each in _find_factors(node, wiring) if each.count in (1, columns)]

    def likeness(factor: OnnxTensor) -> tuple[bool, int]:
        pairs = zip(factor.name, weight.name, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return factor.count == columns, shared

    return max(factors, key=likeness, default=None)


def _find_factors(node: Any, wiring: Wiring) -> Iterator[OnnxTensor]:
    """Yield the stored numbers of the first multiplication behind a node."""
    through = frozenset({"Cast", "Reshape"})
    for reader in list_readers(node, wiring, through):
        if reader.op_type != "Mul":
            continue
        for name in reader.input:
            writer = wiring.writers.get(name)
            inner = writer.input if writer is not None and writer.op_type == "Mul" else ()
            for factor in map(wiring.follow, (name, *inner[:2])):
                if factor is not None and factor.kind.floating:
                    yield factor
        return


def _read_pair(node: Any, wiring: Wiring) -> Iterator[OnnxLayer]:
    """DequantizeLinear of a stored matrix, for the operator that reads it."""
    weight = wiring.read(node, 0)
    if weight is None or weight.kind.name not in INTEGERS or len(weight.shape) < 2:
        return
    readers = list_readers(node, wiring, frozenset())
    reader = next((each for each in readers if each.op_type != "QuantizeLinear"), None)
    columns = reader is not None and (
        reader.op_type == "MatMul"
        or (
            reader.op_type == "Gemm"
            and not any(a.name == "transB" and a.i for a in reader.attribute)
        )
    )
    columns = columns and reader is not None and reader.input[1:2] == node.output[:1]
    scale, block = wiring.read(node, 1), _find_number(node, "block_size")
    rounded = reader is not None and _reads_rounded(reader, wiring)
    yield OnnxLayer(
        name=name_layer(reader if reader is not None else node, weight.name, wiring),
        operator="QDQ",
        weight=weight,
        scale=scale,
        zero_point=wiring.read(node, 2),
        bits=weight.kind.bits,
        group_size=block or None,
        shape=weight.shape[::-1] if columns else weight.shape,
        layout="columns" if columns else "rows",
        inputs="static" if rounded else "float",
    )


def _reads_rounded(node: Any, wiring: Wiring) -> bool:
    """Whether the first input of a node was rounded."""
    writer = wiring.writers.get(node.input[0]) if node.input else None
    return writer is not None and writer.op_type == "DequantizeLinear"


def _find_number(node: Any, name: str) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), 0)


def _read_table(node: Any, wiring: Wiring) -> Iterator[OnnxLayer]:
    """Rows of codes that are looked up and then multiplied: with one scale, or one a row."""
    weight = wiring.read(node, 0)
    if weight is None or weight.kind.name not in INTEGERS or len(weight.shape) != 2:
        return
    scale = zero_point = None
    readers = list_readers(node, wiring, frozenset({"Cast"}))
    for _, reader in zip(range(FEW), readers, strict=False):
        if reader.op_type == "MatMulInteger" and reader.input[:1] == node.output[:1]:
            scale = _find_scale(reader, weight, wiring)
            zero_point = wiring.read(reader, 2)
        elif reader.op_type == "DequantizeLinear" or reader.op_type.startswith("QLinear"):
            scale, zero_point = wiring.read(reader, 1), wiring.read(reader, 2)
        elif reader.op_type == "Mul":
            writers = [wiring.writers.get(name) for name in reader.input]
            gathers = [each for each in writers if each is not None and each.op_type == "Gather"]
            scale = wiring.read(gathers[0], 0) if gathers else scale
    name = name_layer(node, weight.name, wiring)
    bits = weight.kind.bits
    yield OnnxLayer(
        name, "Gather", weight, scale, zero_point, bits, None, weight.shape, "rows", "float"
    )
