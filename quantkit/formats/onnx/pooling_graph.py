"""How token vectors become one vector of the text, as nodes of an ONNX graph.

The arithmetic is that of quantkit/encoders/model.py's `pool`, which is sentence-transformers'.
Letters of shapes: B texts, T tokens of the longest one, H hidden features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantkit.records.encoders import Pooling

if TYPE_CHECKING:
    import onnx_ir as ir

_LOWEST = -1e9
"""What a padded token counts as where the largest value is looked for."""


def append_pooling(model: ir.Model, tokens: ir.Value, mask: ir.Value, pooling: Pooling) -> ir.Value:
    """Add the nodes that make vectors of texts.

    Args:
        model: whose graph is added to.
        tokens: float32 [B, T, H].
        mask: int64 [B, T], 0 for padding.
        pooling: how.

    Returns:
        float32 [B, H], named `sentence_embedding`, not yet an output of the graph.
    """
    import onnx_ir as ir

    tape = ir.tape.Tape(model.graph)
    if pooling.mode == "cls":
        first = _constant(tape, "pooling_first", np.array(0, np.int64))
        vectors = tape.op("Gather", [tokens, first], {"axis": 1})
    else:
        last = _constant(tape, "pooling_last", np.array([-1], np.int64))
        column = tape.op("Unsqueeze", [mask, last])
        vectors = (_largest if pooling.mode == "max" else _mean)(tape, tokens, column)
    if pooling.normalize:
        vectors = _normalize(tape, vectors)
    vectors.name = "sentence_embedding"
    vectors.dtype = ir.DataType.FLOAT
    vectors.shape = ir.Shape(["batch", tokens.shape[2] if tokens.shape is not None else None])
    return vectors


def _mean(tape: ir.tape.Tape, tokens: ir.Value, column: ir.Value) -> ir.Value:
    """The mean over the tokens that are not padding; `column`: int64 [B, T, 1]."""
    import onnx_ir as ir

    weights = tape.op("Cast", [column], {"to": ir.DataType.FLOAT})
    axis = _constant(tape, "pooling_tokens", np.array([1], np.int64))
    least = _constant(tape, "pooling_least", np.array(1e-9, np.float32))
    total = tape.op("ReduceSum", [tape.op("Mul", [tokens, weights]), axis], {"keepdims": 0})
    count = tape.op("ReduceSum", [weights, axis], {"keepdims": 0})
    return tape.op("Div", [total, tape.op("Max", [count, least])])


def _largest(tape: ir.tape.Tape, tokens: ir.Value, column: ir.Value) -> ir.Value:
    """The largest value over the tokens that are not padding; `column`: int64 [B, T, 1]."""
    import onnx_ir as ir

    kept = tape.op("Cast", [column], {"to": ir.DataType.BOOL})
    lowest = _constant(tape, "pooling_lowest", np.array(_LOWEST, np.float32))
    values = tape.op("Where", [kept, tokens, lowest])
    axis = _constant(tape, "pooling_tokens", np.array([1], np.int64))
    return tape.op("ReduceMax", [values, axis], {"keepdims": 0})


def _normalize(tape: ir.tape.Tape, vectors: ir.Value) -> ir.Value:
    """Divide each vector by its length, which counts as 1e-12 at the least."""
    last = _constant(tape, "normalize_last", np.array([-1], np.int64))
    least = _constant(tape, "normalize_least", np.array(1e-12, np.float32))
    square = tape.op("ReduceSum", [tape.op("Mul", [vectors, vectors]), last], {"keepdims": 1})
    length = tape.op("Max", [tape.op("Sqrt", [square]), least])
    return tape.op("Div", [vectors, length])


def _constant(tape: ir.tape.Tape, name: str, values: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    return tape.initializer(ir.tensor(values, name=name))
