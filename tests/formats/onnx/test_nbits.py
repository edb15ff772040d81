"""Codes as MatMulNBits reads them, against ONNX Runtime's own operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.formats.onnx.nbits import pack_codes, pack_layer
from quantkit.formats.onnx.tables import round_table
from quantkit.numerics.affine import choose_absmax, dequantize_layer, quantize
from quantkit.records import QuantizedLayer
from quantkit.schemes import SCHEMES


def make_layer(scheme: str, rows: int, columns: int, group_size: int | None) -> QuantizedLayer:
    """A layer of random weights, rounded to nearest."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.3
    scale, zero_point = choose_absmax(weight, SCHEMES[scheme], group_size, torch.float32)
    codes = quantize(weight, scale, zero_point, SCHEMES[scheme])
    return QuantizedLayer("layer", SCHEMES[scheme], group_size, codes, scale, zero_point)


def run_operator(layer: QuantizedLayer, inputs: np.ndarray, rows: slice) -> np.ndarray:
    """Multiply by some rows of the layer in ONNX Runtime."""
    import onnx
    import onnxruntime

    parts = ["codes", "scales", *([] if layer.zero_point is None else ["zero_points"])]
    tensors = {part: pack_layer(layer, part, rows).numpy() for part in parts}
    columns = inputs.shape[1]
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *parts],
        ["y"],
        domain="com.microsoft",
        bits=layer.scheme.weight_bits,
        block_size=layer.group_size or 128,
        K=columns,
        N=len(layer.codes[rows]),
    )
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info("x", floats, inputs.shape)],
        [onnx.helper.make_tensor_value_info("y", floats, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    versions = [onnx.helper.make_opsetid("", 22), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    outputs: np.ndarray = session.run(None, {"x": inputs})[0]
    return outputs


@pytest.mark.parametrize("rows", [slice(None), slice(3, 9)], ids=["all rows", "a part"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, None])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym", "w8a16"])
def test_onnx_runtime_multiplies_by_what_the_codes_stand_for(
    scheme: str, group_size: int | None, rows: slice
) -> None:
    """Rows of one scale are written as blocks, of which the last is short."""
    columns = 384 if group_size is not None else 200
    layer = make_layer(scheme, 12, columns, group_size)
    inputs = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)

    expected = inputs @ dequantize_layer(layer)[rows].numpy().T

    np.testing.assert_allclose(run_operator(layer, inputs, rows), expected, atol=2e-4)


def test_the_first_code_lies_in_the_low_bits_and_zero_is_eight() -> None:
    """Two codes a byte, unsigned; what fills up the last block is zero bits."""
    codes = torch.tensor([[-8, 7, 0]], dtype=torch.int8)

    assert pack_codes(codes, 4, 16).tolist() == [[[0xF0, 0x08, 0, 0, 0, 0, 0, 0]]]
    assert pack_codes(codes, 8, 16)[0, 0, :3].tolist() == [120, 135, 128]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_is_rounded_better_than_by_absmax(bits: int) -> None:
    """The searched scales leave less squared error, in blocks of 32 columns."""
    table = torch.randn(50, 96, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    scheme = SCHEMES["w4a16" if bits == 4 else "w8a16"]
    scale, _ = choose_absmax(table.float(), scheme, 32, torch.float32)
    plain = QuantizedLayer(
        "table", scheme, 32, quantize(table.float(), scale, None, scheme), scale, None
    )

    found = round_table("table", table, bits, torch.float32)

    def error(layer: QuantizedLayer) -> float:
        return float((dequantize_layer(layer) - table.float()).square().sum())

    assert found.scale.shape == (50, 3)
    assert error(found) < (0.95 if bits == 4 else 0.999) * error(plain)
