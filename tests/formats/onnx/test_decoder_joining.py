"""Queries, keys and values are one product where they are alike, and else three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file as load_numpy

import quantkit
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.formats.onnx.architectures import find_architecture
from quantkit.formats.onnx.decoder import write_float_decoder
from quantkit.formats.onnx.decoder_graph import build_graph
from quantkit.formats.onnx.decoder_joining import join_projections
from quantkit.formats.onnx.decoder_layout import Entry, JoinedContent, LayerContent, rewrite
from tests.formats.onnx.decoder_cases import (
    BOTH,
    decode_artifact,
    decode_layers,
    read_graph,
    run_graph,
    run_job,
    run_transformers,
    some_tokens,
)
from tests.helpers import make_pico_model

PARTS = ("q_proj", "k_proj", "v_proj")
QUERIES, VALUES = 64, 32
"""Rows of the queries' layer and of each of the others."""


def list_attentions(folder: Path) -> list[tuple[Any, list[str]]]:
    """Return the attentions of a graph and the layers in front of each, by name."""
    graph, _ = read_graph(folder)
    found = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            prefix = node.name.rpartition("/GroupQueryAttention")[0]
            layers = {
                each.name.removeprefix(f"{prefix}/").split("/")[0]
                for each in graph.node
                if each.op_type.startswith("MatMul") and each.name.startswith(f"{prefix}/")
            }
            found.append((node, sorted(layers - {"o_proj"})))
    assert len(found) == 2
    return found


def assert_same_logits(folder: Path, model: Path) -> None:
    tokens = some_tokens(40)
    expected = run_transformers(model, tokens)
    difference = np.abs(run_graph(folder, tokens) - expected).max()
    assert difference <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym", "w8a16"])
def test_alike_projections_are_one(tmp_path: Path, scheme: str) -> None:
    """An odd count of blocks leaves half a byte at the end of each row's zero points."""
    model = make_pico_model(tmp_path / "model", hidden=96, heads=6, kv_heads=2)

    run_job(model, tmp_path / "out", *BOTH, scheme=scheme, group_size=32)

    for node, layers in list_attentions(tmp_path / "out" / "onnx"):
        assert layers == ["qkv_proj"]
        assert list(node.input[1:3]) == ["", ""]
    found = decode_layers(tmp_path / "out" / "onnx")
    expected = decode_artifact(tmp_path / "out" / "compressed-tensors")
    np.testing.assert_array_equal(
        found["/model/layers.1/attn/qkv_proj/MatMul/MatMulNBits"],
        np.concatenate([expected[f"model.layers.1.self_attn.{part}"] for part in PARTS]),
    )
    _, tensors = read_graph(tmp_path / "out" / "onnx")
    assert ("model.layers.1.attn.qkv_proj.zero_points" in tensors) == (scheme == "w4a16_asym")
    assert not any(f".{part}." in name for name in tensors for part in PARTS)


@pytest.mark.parametrize(
    ("family", "part", "scheme"),
    [
        ("llama", "v_proj", "w8a16"),
        ("llama", "k_proj", "none"),
        ("llama", "q_proj", "w4a16_asym"),
        ("qwen3", "", ""),
    ],
)
def test_others_stay_three(tmp_path: Path, family: str, part: str, scheme: str) -> None:
    """With other bits, without codes, with zero points, with norms in between."""
    model = make_pico_model(tmp_path / "model", family=family)
    overrides = [{"match": f"*.{part}", "scheme": scheme}] if part else []

    run_job(model, tmp_path / "out", BOTH[1], overrides=overrides)

    for node, layers in list_attentions(tmp_path / "out" / "onnx"):
        assert layers == sorted(PARTS)
        assert all(node.input[:3])
    assert quantkit.verify(tmp_path / "out", against=model).problems == ()


def test_blocks_are_joined_each_for_itself(tmp_path: Path) -> None:
    """One that differs does not keep the others apart."""
    model = make_pico_model(tmp_path / "model")
    overrides = [{"match": "model.layers.0.*.v_proj", "group_size": 64}]

    run_job(model, tmp_path / "out", BOTH[1], overrides=overrides)

    found = [layers for _, layers in list_attentions(tmp_path / "out" / "onnx")]
    assert found == [sorted(PARTS), ["qkv_proj"]]
    assert quantkit.verify(tmp_path / "out", against=model).problems == ()


def test_biases_are_joined_too(tmp_path: Path) -> None:
    """In the order of the rows."""
    model = make_pico_model(tmp_path / "model", family="qwen2", dtype="float32")

    run_job(model, tmp_path / "out", BOTH[1])

    graph, tensors = read_graph(tmp_path / "out" / "onnx")
    stored = load_numpy(model / "model.safetensors")
    biases = [stored[f"model.layers.1.self_attn.{part}.bias"] for part in PARTS]
    np.testing.assert_array_equal(
        tensors["model.layers.1.attn.qkv_proj.Add.bias"], np.concatenate(biases)
    )
    assert any(biases[0])
    assert sum(node.op_type == "Add" and "attn" in node.name for node in graph.node) == 2


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_weights_in_float_are_joined_too(tmp_path: Path, family: str) -> None:
    """The graph that artifacts are timed against is as fast as it can be."""
    model = make_pico_model(tmp_path / "model", family=family)
    checkpoint = open_checkpoint(resolve_source(str(model)))

    folder = write_float_decoder(checkpoint, tmp_path / "float")

    assert [layers for _, layers in list_attentions(folder)] == [["qkv_proj"], ["qkv_proj"]]
    _, tensors = read_graph(folder)
    weight = tensors["model.layers.0.attn.qkv_proj.MatMul.weight.stored"]
    assert weight.shape == (64, QUERIES + 2 * VALUES)
    assert weight.dtype.itemsize == 2
    assert_same_logits(folder, model)


def list_entries(model: Path, output: Path) -> dict[str, Entry]:
    """Return the tensors of a job's graph by name."""
    plan = run_job(model, output, BOTH[1]).plan
    checkpoint = open_checkpoint(resolve_source(str(model)))
    architecture = find_architecture(checkpoint.config)
    assert architecture is not None
    graph = build_graph(checkpoint, architecture, "fp32")
    quantized = {linear.name: linear for linear in plan.linears if linear.quantized}
    entries = join_projections(graph, rewrite(graph, plan.onnx[0], checkpoint, quantized))
    return {entry.name: entry for entry in entries}


def test_parts_of_one_layer_become_it_again(tmp_path: Path) -> None:
    """Phi-3's, whose rows the builder takes apart; Llama's are of three layers."""
    name = "model.layers.1.attn.qkv_proj.codes"
    for family in ("phi3", "llama"):
        make_pico_model(tmp_path / family, family=family)

    phi = list_entries(tmp_path / "phi3", tmp_path / "phi3-out")[name]
    llama = list_entries(tmp_path / "llama", tmp_path / "llama-out")[name]

    assert phi.content == LayerContent(
        "model.layers.1.self_attn.qkv_proj", "codes", slice(0, QUERIES + 2 * VALUES), 1
    )
    assert isinstance(llama.content, JoinedContent)
    assert phi.shape == llama.shape == (QUERIES + 2 * VALUES, 2, 16)
    assert phi.block == llama.block == 1


def test_a_comparison_finds_what_was_joined_in_wrong_order(tmp_path: Path) -> None:
    """Each part is compared for itself."""
    model = make_pico_model(tmp_path / "model")
    run_job(model, tmp_path / "out", BOTH[1])
    comparison = quantkit.verify(tmp_path / "out", against=model).comparison
    assert comparison is not None
    assert {f"model.layers.1.self_attn.{part}" for part in PARTS} <= {
        layer.name for layer in comparison.layers
    }

    _, tensors = read_graph(tmp_path / "out" / "onnx")
    path = tmp_path / "out" / "onnx" / "model.onnx.data"
    data = path.read_bytes()
    for part in ("codes", "scales"):
        rows = tensors[f"model.layers.1.attn.qkv_proj.{part}"].reshape(QUERIES + 2 * VALUES, -1)
        exchanged = np.concatenate([rows[:QUERIES], rows[-VALUES:], rows[QUERIES:-VALUES]])
        assert data.count(rows.tobytes()) == 1
        data = data.replace(rows.tobytes(), exchanged.tobytes())
    path.write_bytes(data)

    problems = quantkit.verify(tmp_path / "out" / "onnx", against=model).problems

    names = [problem.split()[1] for problem in problems if problem.startswith("layer ")]
    assert names == [f"model.layers.1.self_attn.{part}" for part in PARTS[1:]]
