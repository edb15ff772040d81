"""The smallest graph of an encoder: it looks tokens up in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

TOKENS = 600
TABLE = np.random.default_rng(0).normal(size=(TOKENS, 6)).astype(np.float32)


def write_graph(
    path: Path,
    output: str,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    kind: str = "INT64",
) -> Path:
    """Write a graph that looks tokens up in TABLE; its other inputs are only added up."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    integer = getattr(TensorProto, kind)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], [output])]
    values = [helper.make_tensor_value_info(name, integer, ["b", "t"]) for name in inputs]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["b", "t", 6])]
    for name in inputs[1:]:
        nodes.append(helper.make_node("Identity", [name], [f"{name}_seen"]))
        outputs.append(helper.make_tensor_value_info(f"{name}_seen", integer, ["b", "t"]))
    table = numpy_helper.from_array(TABLE, "table")
    graph = helper.make_graph(nodes, "lookup", values, outputs, [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path
