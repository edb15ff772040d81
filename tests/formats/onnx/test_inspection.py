"""`inspect_artifact` on graphs that ONNX Runtime's own tools and onnxruntime-genai made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantkit.errors import ArtifactError
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.inspected import Inspection
from quantkit.formats.onnx.container import open_graph
from quantkit.formats.onnx.decoding import decode_layer
from quantkit.formats.onnx.operators import find_layers
from tests.formats.onnx.decoder_cases import run_job
from tests.formats.onnx.graphs import (
    LAYER,
    TABLE,
    finish,
    make_model,
    make_weights,
    quantize_blocks,
    quantize_dynamically,
    quantize_statically,
    save,
)
from tests.helpers import make_pico_model

PARAMETERS = sum(array.size for array in make_weights().values())


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The graph in float32."""
    return save(make_model(), tmp_path / "plain.onnx")


def check_decoding(path: Path, limit: float, table: bool = True) -> None:
    """Every layer decodes to what was quantized, and nothing else is taken for a layer."""
    layers = {layer.name: layer for layer in find_layers(open_graph(path)).layers}
    weights = {
        name.removesuffix(".weight"): array if name.startswith(TABLE) else array.T
        for name, array in make_weights().items()
        if array.ndim == 2
    }
    if not table:
        del weights[TABLE]
    assert layers.keys() == weights.keys()
    for name, layer in layers.items():
        found = decode_layer(layer)
        assert np.linalg.norm(found - weights[name]) < limit * np.linalg.norm(weights[name])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_columns(tmp_path: Path, bits: int, symmetric: bool) -> None:
    """MatMulNBits, with and without zero points."""
    path = quantize_blocks(make_model(), tmp_path / "model.onnx", bits, symmetric)

    found = inspect_artifact(path)

    assert found.format == "onnx"
    assert found.scheme == f"MatMulNBits int{bits} g32"
    assert found.file == path
    assert found.parameters == PARAMETERS
    assert found.details["accuracy level"] == "4"
    assert found.details["zero points"] == f"{0 if symmetric else 2} of 2 MatMulNBits have them"
    check_decoding(path, 0.2 if bits == 4 else 0.01, table=False)


def test_codes_of_two_bits_decode_as_the_runtime_computes(tmp_path: Path) -> None:
    """A layer's output for unit vectors is its weight."""
    chance = np.random.default_rng(0)
    codes = chance.integers(0, 256, (5, 2, 8), np.uint8)
    tensors = [
        numpy_helper.from_array(codes, "a.b.qweight"),
        numpy_helper.from_array(chance.random(10, np.float32), "scales"),
        numpy_helper.from_array(chance.integers(0, 16, 5, np.uint8), "zeros"),
    ]
    settings = {"K": 40, "N": 5, "bits": 2, "block_size": 32, "domain": "com.microsoft"}
    node = helper.make_node(
        "MatMulNBits", ["x", "a.b.qweight", "scales", "zeros"], ["y"], **settings
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [40, 40])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [40, 5])]
    path = save(finish([node], tensors, inputs, outputs), tmp_path / "model.onnx")

    (layer,) = find_layers(open_graph(path)).layers

    assert layer.name == "a.b"
    np.testing.assert_allclose(decode_layer(layer), run(path, x=np.eye(40)).T, atol=1e-6)


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {name: array.astype(np.float32) for name, array in inputs.items()}
    result: np.ndarray = session.run(None, feed)[0]
    return result


@pytest.mark.parametrize(("kind", "packed"), [("UINT8", 2), ("UINT4", 1), ("INT4", 1)])
@pytest.mark.parametrize("zeros", [True, False])
def test_rows_in_blocks_decode_as_the_runtime_looks_them_up(
    tmp_path: Path, kind: str, packed: int, zeros: bool
) -> None:
    """GatherBlockQuantized: without zero points, bytes have 8 in the middle and nibbles zero."""
    chance = np.random.default_rng(1)
    number = TensorProto.DataType.Value(kind)
    tensors = [
        helper.make_tensor("e.codes", number, [6, 64 // packed], chance.bytes(192), raw=True),
        numpy_helper.from_array(chance.random((6, 2), np.float32), "scales"),
        numpy_helper.from_array(np.arange(6), "rows"),
    ]
    names = ["e.codes", "rows", "scales"]
    if zeros:
        tensors.append(
            helper.make_tensor("zeros", number, [6, 2 // packed], chance.bytes(6), raw=True)
        )
        names.append("zeros")
    settings = {"block_size": 32, "quantize_axis": 1, "domain": "com.microsoft"}
    node = helper.make_node("GatherBlockQuantized", names, ["y"], **settings)
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 64])]
    path = save(finish([node], tensors, [], outputs), tmp_path / "model.onnx")

    (layer,) = find_layers(open_graph(path)).layers

    assert (layer.bits, layer.shape) == (4, (6, 64))
    np.testing.assert_allclose(decode_layer(layer), run(path), atol=1e-6)


@pytest.mark.parametrize("per_channel", [True, False])
def test_dynamic_int8(plain: Path, tmp_path: Path, per_channel: bool) -> None:
    """MatMulInteger, whose scale is a factor of what follows, and a table of codes."""
    path = quantize_dynamically(plain, tmp_path / "model.onnx", per_channel=per_channel)

    found = inspect_artifact(path)

    shared = "channel" if per_channel else "tensor"
    assert found.scheme == f"MatMulInteger int8 {shared}, dynamic int8 inputs, Gather int8 tensor"
    assert found.parameters == PARAMETERS
    check_decoding(path, 0.02)


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_static_int8(plain: Path, tmp_path: Path, form: str) -> None:
    """Both forms of ONNX Runtime; rounded biases count as weights, scales of inputs do not."""
    path = quantize_statically(plain, tmp_path / "model.onnx", form)

    found = inspect_artifact(path)

    words = "QDQ int8 channel" if form == "QDQ" else "QLinearMatMul int8 channel"
    assert f"{words}, static int8 inputs" in found.scheme
    assert abs(found.parameters - PARAMETERS) <= 96 + 64
    check_decoding(path, 0.02)


def test_size_and_bits_are_those_of_all_tensors(plain: Path) -> None:
    """As docs/gate.md defines them."""
    found = inspect_artifact(plain)

    assert found.scheme == "none"
    assert found.tensor_bytes == 4 * PARAMETERS
    assert found.parameters == PARAMETERS
    assert found.bits_per_weight == 32
    assert found.tensors == {"FLOAT": 5}
    assert found.details["producer"] == "tests"
    assert found.details["opsets"] == "ai.onnx 21, com.microsoft 1"
    assert found.details["inputs"] == "input_ids [batch, length]"
    assert found.details["kind of graph"] == "encoder"
    assert found.details["operators"] == "2 MatMul, 2 Add, 1 Gather, 1 Relu"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the output of a job that writes its graph."""
    root = tmp_path_factory.mktemp("decoder")
    model = make_pico_model(root / "model")
    run_job(model, root / "out", {"format": "onnx"})
    return model, root / "out"


def test_a_decoder_of_our_own(decoder: tuple[Path, Path]) -> None:
    """Tied weights count once, the head included; the output, its folder and its file are one."""
    model, output = decoder

    found = inspect_artifact(output)

    assert found.format == "onnx"
    assert found.architecture == "LlamaForCausalLM"
    assert found.scheme == "MatMulNBits int4 g32"
    assert found.details["kind of graph"] == "decoder with a cache, for onnxruntime-genai"
    assert found.parameters == count_weights(model)
    assert math.isclose(found.bits_per_weight, 8 * found.tensor_bytes / found.parameters)
    assert not found.problems
    names = {layer.name for layer in found.layers}
    assert "model.layers.1.self_attn.qkv_proj" in names
    for path in (output / "onnx", output / "onnx" / "model.onnx"):
        assert strip(inspect_artifact(path)) == strip(found)


def strip(found: Inspection) -> dict[str, Any]:
    return {key: value for key, value in vars(found).items() if key not in ("folder", "file")}


def count_weights(model: Path) -> int:
    from safetensors.torch import load_file as load

    return sum(tensor.numel() for tensor in load(model / "model.safetensors").values())


def test_names_cannot_move_a_terminal(tmp_path: Path) -> None:
    """Nothing of the file is shown as it is."""
    model = make_model()
    model.producer_name = "\x1b[2J"
    model.metadata_props.add(key="k\r", value="\x07")
    model.graph.node[0].op_type = "Gather\x1b[1A"
    found = inspect_artifact(save(model, tmp_path / "model.onnx"))

    assert json.dumps(dict(found.details)).isprintable()


def test_a_folder_of_another_format_is_not_onnx(decoder: tuple[Path, Path], tmp_path: Path) -> None:
    """Checkpoints that have a graph in onnx/ stay checkpoints; two graphs are told apart."""
    model, _ = decoder
    assert inspect_artifact(model).format == "safetensors"
    for name in ("a", "b"):
        save(make_model(), tmp_path / f"{name}.onnx")
    with pytest.raises(ArtifactError, match="holds 2 ONNX files"):
        inspect_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="there is no artifact at"):
        inspect_artifact(tmp_path / "c.onnx")


def test_a_layer_without_a_name_is_called_by_its_bias(tmp_path: Path) -> None:
    """Exporters transpose weights and call them val_1."""
    model = make_model()
    for tensor in model.graph.initializer:
        if tensor.name == f"{LAYER}.weight":
            tensor.name = "val_1"
    for node in model.graph.node:
        node.input[:] = ["val_1" if name == f"{LAYER}.weight" else name for name in node.input]
    found = inspect_artifact(quantize_blocks(model, tmp_path / "model.onnx"))

    assert {layer.name for layer in found.layers if layer.scheme != "none"} == {
        LAYER,
        "encoder.layer.1.dense",
    }
