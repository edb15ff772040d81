"""An encoder in float16: its weights alone, which the graph widens again, or all that it computes.

ONNX Runtime widens them once, as it loads the file: half the bytes, and the arithmetic of float32.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from quantkit.errors import ArtifactError

if TYPE_CHECKING:
    import onnx_ir as ir

_DIMENSIONS = 2
"""Those of a weight or a table; biases, norms and constants are few and stay as they are."""


def halve(model: nn.Module) -> nn.Module:
    """Return a copy of a float32 model that computes in float16.

    Buffers stay as they are, as transformers leaves them: of the frequencies of rotary embeddings
    float16 keeps so little that angles of a few hundred tokens are wrong by tenths.
    """
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.half()
    return half


def store_half(model: ir.Model) -> None:
    """Store every matrix of the graph in float16 behind a Cast, in place.

    Raises:
        ArtifactError: a weight is too large for float16.
    """
    import onnx_ir as ir

    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < _DIMENSIONS:
            continue
        with np.errstate(over="ignore"):
            half = tensor.numpy().astype(np.float16)
        if not np.isfinite(half).all():
            raise ArtifactError(
                f"{name} has weights beyond the range of float16: export precision fp32"
            )
        stored = ir.Value(
            name=f"{name}.half",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half, name=f"{name}.half"),
        )
        model.graph.register_initializer(stored)
        wide = ir.tape.Tape(model.graph).op("Cast", [stored], {"to": ir.DataType.FLOAT})
        wide.shape, wide.dtype = value.shape, ir.DataType.FLOAT
        value.replace_all_uses_with(wide)
        model.graph.initializers.pop(name)
    model.graph.sort()
