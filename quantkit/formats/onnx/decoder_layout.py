"""From the builder's graph to the one that is written: operators for codes, tensors as they lie.

Floats lie in the file in the checkpoint's own dtype and are cast in the graph; ONNX Runtime does
that once, as it loads. A tied output layer is the embedding, transposed in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.onnx.decoder_graph import DecoderGraph, WeightSource, find_source
from quantkit.formats.onnx.dtypes import ACTIVATIONS, FLOATS
from quantkit.formats.onnx.nbits import block_columns, count_blocks
from quantkit.records import LinearPlan, OnnxPlan
from quantkit.schemes import ONNX_TABLE_BLOCK

Part = Literal["codes", "scales", "zero_points"]
_TABLE_BITS: Mapping[str, int] = MappingProxyType({"int4": 4, "int8": 8})
_SMALL = 1024
"""Bytes up to which a constant lies in the graph."""


@dataclass(frozen=True)
class FloatContent:
    """Values of the checkpoint, transposed or not."""

    source: WeightSource
    transposed: bool


@dataclass(frozen=True)
class LayerContent:
    """A part of a layer's codes; rows None: all."""

    layer: str
    part: Part
    rows: slice | None
    block: int | None


@dataclass(frozen=True)
class TableContent:
    """A part of an embedding or an output layer that is rounded without data.

    scale_dtype: onnx's name.
    """

    tensor: str
    part: Part
    bits: int
    scale_dtype: str


@dataclass(frozen=True)
class ConstantContent:
    """Values that the builder computed."""

    values: Tensor


@dataclass(frozen=True)
class JoinedContent:
    """Parts of several layers of a block, one behind the other along an axis."""

    parts: tuple[FloatContent | LayerContent, ...]
    axis: int


Content = FloatContent | LayerContent | TableContent | ConstantContent | JoinedContent


@dataclass(frozen=True)
class Entry:
    """A tensor of the graph. dtype: onnx's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Content

    @property
    def parts(self) -> tuple[Content, ...]:
        """What the tensor is put together from; itself where it is not."""
        return self.content.parts if isinstance(self.content, JoinedContent) else (self.content,)

    @property
    def block(self) -> int | None:
        """The decoder block that the tensor is of; None outside of all."""
        first = self.parts[0]
        if isinstance(first, FloatContent):
            return first.source.block
        return first.block if isinstance(first, LayerContent) else None


@dataclass(frozen=True)
class _Target:
    """What the rewriting works on."""

    graph: DecoderGraph
    plan: OnnxPlan
    checkpoint: Checkpoint
    quantized: Mapping[str, LinearPlan]
    entries: dict[str, Entry]

    @property
    def computed(self) -> str:
        """onnx's name of the dtype that the graph computes in."""
        return ACTIVATIONS[self.plan.activations]

    @property
    def ir(self) -> Any:
        """The graph."""
        return self.graph.builder.model.graph


def rewrite(
    graph: DecoderGraph,
    plan: OnnxPlan,
    checkpoint: Checkpoint,
    quantized: Mapping[str, LinearPlan],
) -> list[Entry]:
    """Rewrite the builder's graph in place and return its tensors in the order of the file.

    Args:
        quantized: the layers whose codes go in, by name.

    Raises:
        ArtifactError: the builder has a weight that quantkit does not know.
    """
    target = _Target(graph, plan, checkpoint, quantized, {})
    for value in list(target.ir.initializers.values()):
        source = find_source(graph, value.name)
        if source is None:
            _keep_constant(target, value)
            continue
        node = value.uses()[0].node
        if len(value.shape) == 1:
            _place_vector(target, value, source)
        elif source.tensor == graph.embedding and node.op_type == "Gather":
            _place_embedding(target, value, node, source)
        elif source.tensor == graph.head:
            _place_head(target, value, node, source)
        else:
            _place_weight(target, value, node, source)
    target.ir.sort()
    return sort_entries(target.entries.values())


def sort_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Bring tensors into the order of the file: those outside of blocks, then block by block."""
    return sorted(entries, key=lambda entry: -1 if entry.block is None else entry.block)


def _keep_constant(target: _Target, value: Any) -> None:
    """Tables of the rotary embedding lie in the file, shapes and the like in the graph."""
    if not value.uses():
        _drop(target, value)
        return
    if value.const_value.nbytes <= _SMALL:
        return
    values = torch.from_numpy(value.const_value.numpy().copy())
    target.entries[value.name] = Entry(
        value.name, value.dtype.name, tuple(value.shape.numpy()), ConstantContent(values)
    )


def _place_vector(target: _Target, value: Any, source: WeightSource) -> None:
    """Norms and biases lie in the dtype in which they are used: they are small."""
    content = FloatContent(source, False)
    shape = tuple(value.shape.numpy())
    target.entries[value.name] = Entry(value.name, value.dtype.name, shape, content)


def _place_embedding(target: _Target, value: Any, node: Any, source: WeightSource) -> None:
    bits = _TABLE_BITS.get(target.plan.embeddings)
    if bits is None:
        stored = _add_float(target, source, transposed=False)
        # Rows are cast, not the table.
        rows = _insert(target, node, "Gather", [stored, node.inputs[1]], {})
        cast = _insert(target, node, "Cast", [rows], {"to": value.dtype})
        _replace(target, node, cast, value)
        return
    codes, scales = _add_table(target, source, bits)
    rows, columns = _shape_of(target, source)
    flat = _add_constant(target, f"{codes.name}.shape", [rows, columns * bits // 8])
    table = _insert(target, node, "Reshape", [codes, flat], {})
    attributes = {
        "bits": bits,
        "block_size": ONNX_TABLE_BLOCK,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    found = _insert(
        target, node, "GatherBlockQuantized", [table, node.inputs[1], scales], attributes
    )
    _replace(target, node, found, value)


def _place_head(target: _Target, value: Any, node: Any, source: WeightSource) -> None:
    bits = _TABLE_BITS.get(target.plan.lm_head)
    if bits is not None:
        codes, scales = _add_table(target, source, bits)
        rows, columns = _shape_of(target, source)
        found = _multiply(target, node, [codes, scales], bits, ONNX_TABLE_BLOCK, columns, rows)
        _replace(target, node, found, value)
    elif source.tensor == target.graph.embedding:
        stored = _add_float(target, source, transposed=False)
        _multiply_float(target, node, value, stored, transpose=True)
    else:
        _place_weight(target, value, node, source)


def _place_weight(target: _Target, value: Any, node: Any, source: WeightSource) -> None:
    """A linear layer of a block, or an output layer of its own."""
    linear = target.quantized.get(source.tensor.removesuffix(".weight"))
    if linear is None:
        stored = _add_float(target, source, transposed=True, name=value.name)
        _multiply_float(target, node, value, stored, transpose=False)
        return
    columns, rows = value.shape.numpy()
    bits, block = linear.scheme.weight_bits, block_columns(linear.group_size)
    blocks = count_blocks(columns, block)
    base = value.name.removesuffix(".MatMul.weight")
    shapes: dict[Part, tuple[str, tuple[int, ...]]] = {
        "codes": ("UINT8", (rows, blocks, block * bits // 8)),
        "scales": (target.computed, (rows * blocks,)),
    }
    if not linear.scheme.symmetric:
        shapes["zero_points"] = ("UINT8", (rows * -(-blocks * bits // 8),))
    inputs = []
    for part, (dtype, shape) in shapes.items():
        content = LayerContent(linear.name, part, source.rows, source.block)
        inputs.append(_add(target, Entry(f"{base}.{part}", dtype, shape, content)))
    _replace(target, node, _multiply(target, node, inputs, bits, block, columns, rows), value)


def _multiply(
    target: _Target,
    node: Any,
    weights: list[Any],
    bits: int,
    block: int,
    columns: int,
    rows: int,
) -> Any:
    attributes = {
        "bits": bits,
        "block_size": block,
        "K": columns,
        "N": rows,
        "accuracy_level": target.plan.accuracy_level,
    }
    return _insert(target, node, "MatMulNBits", [node.inputs[0], *weights], attributes)


def _multiply_float(
    target: _Target, node: Any, value: Any, stored: Any, *, transpose: bool
) -> None:
    """Let `node` multiply by a stored tensor, cast and transposed as it is needed."""
    if stored is value:
        return
    found = stored
    if stored.dtype != value.dtype:
        found = _insert(target, node, "Cast", [found], {"to": value.dtype}, of=stored)
    if transpose:
        found = _insert(target, node, "Transpose", [found], {"perm": [1, 0]}, of=stored)
    node.replace_input_with(1, found)
    _drop(target, value)


def _add_float(
    target: _Target, source: WeightSource, *, transposed: bool, name: str | None = None
) -> Any:
    """Return the value of a matrix in the dtype in which it lies, added if it is not there."""
    dtype = FLOATS[target.checkpoint.tensors[source.tensor].dtype]
    if target.plan.precision == "fp16":
        dtype = "FLOAT16"
    rows, columns = _shape_of(target, source)
    shape = (columns, rows) if transposed else (rows, columns)
    stored = f"{name or source.tensor}.stored"
    return _add(target, Entry(stored, dtype, shape, FloatContent(source, transposed)))


def _add_table(target: _Target, source: WeightSource, bits: int) -> list[Any]:
    """Return the codes and scales of a table; an embedding and a tied head share them."""
    rows, columns = _shape_of(target, source)
    blocks = columns // ONNX_TABLE_BLOCK
    shapes: dict[Part, tuple[str, tuple[int, ...]]] = {
        "codes": ("UINT8", (rows, blocks, ONNX_TABLE_BLOCK * bits // 8)),
        "scales": (target.computed, (rows, blocks)),
    }
    base = f"{source.tensor.removesuffix('.weight')}.int{bits}"
    return [
        _add(
            target,
            Entry(
                f"{base}.{part}",
                dtype,
                shape,
                TableContent(source.tensor, part, bits, target.computed),
            ),
        )
        for part, (dtype, shape) in shapes.items()
    ]


def _shape_of(target: _Target, source: WeightSource) -> tuple[int, int]:
    rows, columns = target.checkpoint.tensors[source.tensor].shape
    return (rows if source.rows is None else source.rows.stop - source.rows.start), columns


def _add_constant(target: _Target, name: str, numbers: list[int]) -> Any:
    """Return the value of a constant that lies in the graph, where its readers look for it."""
    import onnx_ir

    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(numbers, name=name))
    value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
    target.ir.register_initializer(value)
    return value


def _add(target: _Target, entry: Entry) -> Any:
    """Return the graph's value of an entry, which is registered unless it is there."""
    if entry.name in target.entries:
        return target.ir.initializers[entry.name]
    target.entries[entry.name] = entry
    return register(target.graph, entry)


def register(graph: DecoderGraph, entry: Entry) -> Any:
    """Give the graph a value for an entry, and return it."""
    import onnx_ir

    dtype, shape = onnx_ir.DataType[entry.dtype], onnx_ir.Shape(entry.shape)
    value = onnx_ir.Value(name=entry.name, shape=shape, type=onnx_ir.TensorType(dtype))
    # It gets its place in the file once all tensors are known.
    value.const_value = onnx_ir.ExternalTensor("", 0, 0, dtype, shape=shape, name=entry.name)
    graph.builder.model.graph.register_initializer(value)
    return value


def _insert(
    target: _Target,
    before: Any,
    operator: str,
    inputs: list[Any],
    attributes: Mapping[str, Any],
    of: Any = None,
) -> Any:
    """Put a node in front of another and return its output."""
    import onnx_ir

    domain = "com.microsoft" if operator in {"MatMulNBits", "GatherBlockQuantized"} else ""
    name = f"{before.name if of is None else '/' + of.name}/{operator}"
    node = onnx_ir.node(operator, inputs, attributes=dict(attributes), domain=domain, name=name)
    node.outputs[0].name = f"{name}/output_0"
    target.ir.insert_before(before, node)
    return node.outputs[0]


def _replace(target: _Target, node: Any, found: Any, weight: Any) -> None:
    """Let `found` take the place of a node's output, and drop the node and its weight."""
    old = node.outputs[0]
    found.dtype, found.shape = old.dtype, old.shape
    old.replace_all_uses_with(found, replace_graph_outputs=True)
    name = old.name
    target.ir.remove(node, safe=True)
    old.name = None
    found.name = name
    _drop(target, weight)


def _drop(target: _Target, value: Any) -> None:
    del target.ir.initializers[value.name]
