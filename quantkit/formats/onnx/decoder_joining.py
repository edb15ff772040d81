"""One product for queries, keys and values, where a decoder's graph has three that are alike.

GroupQueryAttention reads [B, T, (heads + 2 * key/value heads) * head size] as its first input and
then no keys and values (docs/ContribOperators.md of ONNX Runtime 1.32). Rows of codes and of scales
are independent, and each row of zero points begins with a byte of its own: joined along the rows
they stand for the same weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quantkit.formats.onnx.decoder_graph import DecoderGraph
from quantkit.formats.onnx.decoder_layout import (
    Entry,
    FloatContent,
    JoinedContent,
    LayerContent,
    register,
    sort_entries,
)

_ATTENTION = "GroupQueryAttention"
_FIRST, _JOINED = "q_proj", "qkv_proj"
"""What the builder calls the queries' layer, and one of all three."""


def join_projections(graph: DecoderGraph, entries: Sequence[Entry]) -> list[Entry]:
    """Join in place, and return the tensors in the order of the file.

    Three products stay where their weights differ in bits, blocks, symmetry or dtype, where not
    all have biases, and where a norm comes between one and the attention.

    Args:
        graph: rewritten. entries: its tensors.
    """
    known = {entry.name: entry for entry in entries}
    for attention in [node for node in graph.builder.model.graph if node.op_type == _ATTENTION]:
        paths = [_trace(value, known) for value in attention.inputs[:3]]
        if not all(paths) or not _are_alike(paths, known):
            continue
        for nodes in zip(*paths, strict=True):
            _join_nodes(graph, nodes, known)
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
        for path in paths[1:]:
            for node in path:
                graph.builder.model.graph.remove(node, safe=True)
    return sort_entries(known.values())


def _trace(value: Any, known: dict[str, Entry]) -> tuple[Any, ...]:
    """Return the nodes that make a value of an input: the sum with a bias, the product, the cast of
    a weight; nothing where others do, or where the value is read by others too."""
    path = []
    adding = _writer(value, "Add")
    if adding is not None:
        path.append(adding)
        value = adding.inputs[0]
    product = _writer(value, "MatMul", "MatMulNBits")
    if product is None:
        return ()
    path.append(product)
    casting = _writer(product.inputs[1], "Cast")
    if casting is not None:
        path.append(casting)
    made = {id(output) for node in path for output in node.outputs}
    inputs = [each for node in path for each in node.inputs if id(each) not in made]
    stored = [each for each in inputs if each is not product.inputs[0]]
    return tuple(path) if all(each.name in known for each in stored) else ()


def _writer(value: Any, *operators: str) -> Any:
    """Return the node that writes a value for one reader; None where it is none of these."""
    node = None if value is None or len(value.uses()) != 1 else value.producer()
    return node if node is not None and node.op_type in operators else None


def _are_alike(paths: Sequence[tuple[Any, ...]], known: dict[str, Entry]) -> bool:
    """Whether the same is done to the same input, with weights of the same kinds."""
    kinds = []
    for path in paths:
        read = [each for node in path for each in node.inputs]
        dtypes = [known[each.name].dtype for each in read if each.name in known]
        attributes = [
            {key: each.value for key, each in node.attributes.items() if key != "N"}
            for node in path
        ]
        kinds.append(([node.op_type for node in path], attributes, dtypes))
    sources = {id(node.inputs[0]) for path in paths for node in path if "MatMul" in node.op_type}
    return kinds[0] == kinds[1] == kinds[2] and len(sources) == 1


def _join_nodes(graph: DecoderGraph, nodes: Sequence[Any], known: dict[str, Entry]) -> None:
    """Let the first of three nodes do what all do."""
    import onnx_ir

    first, output = nodes[0], nodes[0].outputs[0]
    for position, value in enumerate(first.inputs):
        if value.name in known:
            stored = [node.inputs[position] for node in nodes]
            first.replace_input_with(position, _join_tensors(graph, stored, known))
    first.name, output.name = (name.replace(_FIRST, _JOINED) for name in (first.name, output.name))
    if "N" in first.attributes:
        rows = sum(node.attributes["N"].value for node in nodes)
        first.attributes["N"] = onnx_ir.AttrInt64("N", rows)
    if output.shape is not None:
        width = sum(node.outputs[0].shape[-1] for node in nodes)
        output.shape = onnx_ir.Shape([*output.shape[:-1], width])


def _join_tensors(graph: DecoderGraph, values: Sequence[Any], known: dict[str, Entry]) -> Any:
    """Return the value of three tensors one behind the other, which takes their place."""
    entries = [known.pop(value.name) for value in values]
    for entry in entries:
        del graph.builder.model.graph.initializers[entry.name]
    parts = tuple(
        entry.content for entry in entries if isinstance(entry.content, FloatContent | LayerContent)
    )
    first = entries[0]
    axis = 1 if isinstance(first.content, FloatContent) and first.content.transposed else 0
    shape = list(first.shape)
    shape[axis] = sum(entry.shape[axis] for entry in entries)
    content = _find_whole(parts) or JoinedContent(parts, axis)
    name = first.name.replace(_FIRST, _JOINED)
    known[name] = Entry(name, first.dtype, tuple(shape), content)
    return register(graph, known[name])


def _find_whole(parts: Sequence[FloatContent | LayerContent]) -> LayerContent | None:
    """Return what codes are together that were cut from one layer; None for those of several."""
    layers = [part for part in parts if isinstance(part, LayerContent)]
    rows = [part.rows for part in layers if part.rows is not None]
    if len(rows) < len(parts) or len({part.layer for part in layers}) > 1:
        return None
    if any(one.stop != other.start for one, other in itertools.pairwise(rows)):
        return None
    return replace(layers[0], rows=slice(rows[0].start, rows[-1].stop))
