"""The simulation against ONNX Runtime's own operators, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkit.encoders.simulation import find_grid, round_to_codes, simulated
from quantkit.records import EncoderLayer, EncoderTable

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def _round_dynamically(inputs: np.ndarray) -> list[np.ndarray]:
    """DynamicQuantizeLinear: codes, scale, zero point."""
    from onnx import TensorProto, helper

    shape = list(inputs.shape)
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("q", TensorProto.UINT8, shape),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("zero", TensorProto.UINT8, []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, {"x": inputs})
    return found


@pytest.mark.parametrize("shift", [-4.0, -0.3, 0.0, 0.7, 5.0])
def test_inputs_are_rounded_as_onnx_runtime_rounds_them(shift: float) -> None:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(50, 64, generator=generator) + shift
    codes, scale, zero = _round_dynamically(inputs.numpy())

    grid = find_grid(inputs.min(), inputs.max())
    found = round_to_codes(inputs, *grid) + grid[1]
    assert float(grid[0]) == pytest.approx(float(scale), rel=1e-6)
    assert int(grid[1]) == int(zero)
    # A quotient in the middle between two codes may fall on either side.
    assert float((found - torch.from_numpy(codes).float()).abs().max()) <= 1
    assert float((found != torch.from_numpy(codes).float()).float().mean()) < 0.002


def test_an_input_of_zeros_stays_zero() -> None:
    inputs = torch.zeros(3, 4)
    grid = find_grid(inputs.min(), inputs.max())
    assert torch.equal(round_to_codes(inputs, *grid) * grid[0], inputs)


def _layer(generator: torch.Generator, **changes: object) -> EncoderLayer:
    codes = torch.randint(-127, 128, (6, 8), generator=generator, dtype=torch.int8)
    scale = torch.rand(6, generator=generator) * 0.01 + 0.01
    layer = EncoderLayer("0", "0", codes, scale, None, None, None, None)
    return replace(layer, **changes)  # type: ignore[arg-type]


def _by_hand(inputs: Tensor, layer: EncoderLayer, bias: Tensor) -> np.ndarray:
    """The layer in whole numbers and float64."""
    values = inputs.double().numpy()
    if layer.smoothing is not None:
        values = values / layer.smoothing.double().numpy()
    if layer.input_scale is not None and layer.input_zero_point is not None:
        step, zero = layer.input_scale, layer.input_zero_point
    else:
        if layer.clip is not None:
            values = np.clip(values, *layer.clip)
        step = (max(values.max(), 0) - min(values.min(), 0)) / 255
        zero = round(-min(values.min(), 0) / step)
    codes = np.clip(np.round(values / step) + zero, 0, 255).astype(np.int64) - zero
    sums = codes @ layer.codes.numpy().astype(np.int64).T
    own = bias if layer.bias is None else layer.bias
    result: np.ndarray = sums * (step * layer.scale.double().numpy()) + own.double().numpy()
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"smoothing": torch.linspace(0.5, 3.0, 8)},
        {"clip": (-0.5, 0.9)},
        {"smoothing": torch.linspace(0.5, 3.0, 8), "clip": (-0.5, 0.9), "bias": torch.ones(6)},
        {"input_scale": 0.013, "input_zero_point": 99},
    ],
)
def test_a_layer_computes_what_its_codes_say(changes: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(5)
    layer = _layer(generator, **changes)
    model = nn.Sequential(nn.Linear(8, 6)).requires_grad_(False)
    inputs = torch.randn(20, 8, generator=generator)
    with simulated(model, [layer]):
        found = model(inputs)
    expected = _by_hand(inputs, layer, model[0].bias)
    assert np.allclose(found.numpy(), expected, atol=1e-4)


def test_the_model_is_as_it_was_afterwards(tmp_path: Path) -> None:
    """Also after an error in between."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 6), nn.Embedding(4, 3)).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = EncoderTable("1", torch.ones(4, 3, dtype=torch.int8), torch.arange(4.0))
    inputs = torch.randn(5, 8, generator=generator)
    plain = model[0](inputs)

    def fail() -> None:
        with simulated(model, [_layer(generator)], [table]):
            assert float(model[1].weight[3, 0]) == 3.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model[0](inputs), plain)
