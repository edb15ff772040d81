"""Small graphs, made with onnx's own helpers, and quantized with ONNX Runtime's own tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYER = "encoder.layer.0.dense"
TABLE = "embeddings.word_embeddings"
SIZES = {"vocabulary": 50, "inputs": 64, "outputs": 96}


def make_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A table [50, 64], two matrices [64, 96] and [96, 64] as MatMul reads them, and biases."""
    chance = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return chance.normal(0, 0.1, shape).astype(np.float32)

    return {
        f"{TABLE}.weight": draw(50, 64),
        f"{LAYER}.weight": draw(64, 96),
        f"{LAYER}.bias": draw(96),
        "encoder.layer.1.dense.weight": draw(96, 64),
        "encoder.layer.1.dense.bias": draw(64),
    }


def make_model(weights: Mapping[str, np.ndarray] | None = None) -> Any:
    """input_ids -> rows of a table -> two linear layers."""
    weights = make_weights() if weights is None else weights
    nodes = [helper.make_node("Gather", [f"{TABLE}.weight", "input_ids"], ["rows"], "lookup")]
    value = "rows"
    for number in (0, 1):
        name = f"encoder.layer.{number}.dense"
        nodes += [
            helper.make_node("MatMul", [value, f"{name}.weight"], [f"p{number}"], f"m{number}"),
            helper.make_node("Add", [f"p{number}", f"{name}.bias"], [f"s{number}"], f"a{number}"),
        ]
        value = f"s{number}"
    nodes.append(helper.make_node("Relu", [value], ["out"], "relu"))
    return finish(
        nodes,
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "length", 64])],
    )


def finish(
    nodes: Iterable[Any], tensors: Iterable[Any], inputs: Iterable[Any], outputs: Iterable[Any]
) -> Any:
    """A model of opset 21 that may use ONNX Runtime's operators."""
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(tensors))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="tests")


def save(model: Any, path: Path, external: str | None = None) -> Path:
    """Write a model, its tensors into a file beside it where that is named."""
    if external is not None:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    else:
        path.write_bytes(model.SerializeToString())
    return path


def quantize_blocks(model: Any, path: Path, bits: int = 4, symmetric: bool = True) -> Path:
    """MatMulNBits by ONNX Runtime's own quantizer."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        model, block_size=32, is_symmetric=symmetric, accuracy_level=4, bits=bits
    )
    quantizer.process()
    return save(quantizer.model.model, path)


def quantize_dynamically(source: Path, path: Path, **settings: Any) -> Path:
    """INT8 by onnxruntime.quantization.quantize_dynamic."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, path, weight_type=QuantType.QInt8, **settings)
    return path


def quantize_statically(source: Path, path: Path, form: str) -> Path:
    """INT8 by onnxruntime.quantization.quantize_static; form: QDQ or QOperator."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Two batches of token ids."""

        def __init__(self) -> None:
            self.rows = iter([{"input_ids": np.array([[n, n + 7]])} for n in (1, 2)])

        def get_next(self) -> Any:
            return next(self.rows, None)

    quantize_static(source, path, Reader(), quant_format=QuantFormat[form], per_channel=True)
    return path
