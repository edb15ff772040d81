"""Jobs that write ONNX graphs of decoders, and a reader of their tensors that is not quantkit's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantkit
from quantkit.formats.decode import open_artifact, read_stored_layer
from quantkit.numerics.affine import dequantize_layer
from quantkit.recipe import Recipe
from quantkit.records import Result

BOTH = ({"format": "compressed-tensors"}, {"format": "onnx"})
PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def run_job(model: Path, output: Path, *exports: dict[str, object], **quantize: object) -> Result:
    """An ungated job without calibration."""
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": str(model),
            "output": str(output),
            "quantize": {"method": "rtn", "group_size": 32, **quantize},
            "export": list(exports),
        }
    )
    return quantkit.quantize(recipe, gate=False, device="cpu")


def read_graph(folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the graph and its tensors by name."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    return model.graph, tensors


def decode_layers(folder: Path) -> dict[str, np.ndarray]:
    """Return name of a MatMulNBits node -> the weight [N, K] that its codes stand for, float32."""
    graph, tensors = read_graph(folder)
    found = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        settings = {each.name: each.i for each in node.attribute}
        bits, block = settings["bits"], settings["block_size"]
        rows, columns = settings["N"], settings["K"]
        codes = unpack(tensors[node.input[1]].reshape(rows, -1), bits)
        blocks = codes.shape[1] // block
        zeros = np.full((rows, blocks), 1 << (bits - 1))
        if len(node.input) > 3:
            zeros = unpack(tensors[node.input[3]].reshape(rows, -1), bits)[:, :blocks]
        scales = tensors[node.input[2]].reshape(rows, blocks)
        steps = codes.reshape(rows, blocks, block).astype(np.float32) - zeros[:, :, None]
        weight = (steps * scales[:, :, None]).reshape(rows, -1)[:, :columns]
        found[node.name] = weight
    return found


def unpack(data: np.ndarray, bits: int) -> np.ndarray:
    """Return the unsigned codes of bytes [N, *], the low bits first."""
    if bits == 8:
        return data.astype(np.int32)
    pairs = np.stack([data & 15, data >> 4], axis=2)
    return pairs.reshape(len(data), -1).astype(np.int32)


def decode_artifact(folder: Path) -> dict[str, np.ndarray]:
    """Return name of a layer -> its weight, from a compressed-tensors artifact."""
    artifact = open_artifact(folder)
    names = [name for name in artifact.tensors if name.endswith(".weight_packed")]
    layers = [read_stored_layer(artifact, name.removesuffix(".weight_packed")) for name in names]
    return {layer.name: dequantize_layer(layer).numpy() for layer in layers}


def run_graph(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of ONNX Runtime for tokens [B, T]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for each in session.get_inputs():
        if each.name.startswith("past_key_values"):
            width = _head_size(folder)
            dtype = np.float16 if "16" in each.type else np.float32
            feed[each.name] = np.zeros((len(tokens), each.shape[1], 0, width), dtype)
    logits: np.ndarray = session.run(["logits"], feed)[0]
    return logits.astype(np.float32)


def _head_size(folder: Path) -> int:
    import json

    config = json.loads((folder / "genai_config.json").read_text())
    return int(config["model"]["decoder"]["head_size"])


def run_transformers(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(tokens)).logits.numpy()
    return logits


def some_tokens(count: int, vocabulary: int = 300) -> np.ndarray:
    """Token ids [1, count], none of them special."""
    return np.random.default_rng(0).integers(3, vocabulary, (1, count))


def name_module(node: str) -> str:
    """The checkpoint's name of a node's layer."""
    path = node.strip("/").removesuffix("/MatMul/MatMulNBits").replace("/", ".")
    return path.replace(".attn.", ".self_attn.")


def fuse_parts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join what some checkpoints and graphs have in one and others in parts."""
    fused = dict(weights)
    for name in weights:
        base, _, leaf = name.rpartition(".")
        for whole, parts in PARTS.items():
            members = [f"{base}.{part}" for part in parts]
            if leaf == parts[0] and all(member in fused for member in members):
                fused[f"{base}.{whole}"] = np.concatenate([fused.pop(each) for each in members])
    return fused


def assert_same_codes(output: Path) -> None:
    """What the graph's codes stand for is what the compressed-tensors artifact has."""
    expected, found = decode_artifact(output / "compressed-tensors"), decode_layers(output / "onnx")
    assert len(expected) >= 8
    wanted = fuse_parts(expected)
    modules = fuse_parts({name_module(name): weight for name, weight in found.items()})
    assert sorted(modules) == sorted(wanted)
    for layer, weight in wanted.items():
        np.testing.assert_array_equal(modules[layer], weight, err_msg=layer)
