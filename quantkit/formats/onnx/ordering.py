"""Whether the nodes of a graph stand in an order in which they can be computed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from quantkit.formats.onnx.container import OnnxFile
from quantkit.formats.onnx.wiring import show

_MOST = 5
"""Nodes that are named."""


def check_order(file: OnnxFile) -> Iterator[str]:
    """Yield nodes that read what nothing before them writes, and values that are written twice.

    Of the main graph: what inner graphs see is left to onnx's checker.
    """
    found = _find_misplaced(file)
    yield from islice(found, _MOST)
    rest = sum(1 for _ in found)
    if rest:
        yield f"{rest} more nodes have such inputs or outputs"
    written = {name for node in file.main.nodes for name in node.output}
    known = written | _names_given(file)
    for value in file.model.graph.output:
        if value.name not in known:
            yield f"nothing writes the output {show(value.name)}"


def _names_given(file: OnnxFile) -> set[str]:
    """Return what is there before the first node."""
    inputs = {value.name for value in file.model.graph.input}
    sparse = {each.values.name for each in file.model.graph.sparse_initializer}
    return inputs | sparse | {each.name for each in file.model.graph.initializer}


def _find_misplaced(file: OnnxFile) -> Iterator[str]:
    written = {name for node in file.main.nodes for name in node.output}
    known = _names_given(file)
    for number, node in enumerate(file.main.nodes):
        where = f"node {show(node.name) or number} ({show(node.op_type)})"
        missing = next((name for name in node.input if name and name not in known), None)
        if missing is not None and missing in written:
            yield f"{where} reads {show(missing)} before it is written: a circle, or no order"
        elif missing is not None:
            yield f"{where} reads {show(missing)}, which nothing writes"
        twice = next((name for name in node.output if name and name in known), None)
        if twice is not None:
            yield f"{where} writes {show(twice)}, which is there already"
        known.update(node.output)
