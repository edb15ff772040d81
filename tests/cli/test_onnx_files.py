"""`quantkit inspect` and `verify` on an ONNX file through the real parser."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.cli.running import run_here
from tests.formats.onnx.graphs import LAYER, make_model, quantize_blocks, save


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two layers in 4 bits, by ONNX Runtime's own quantizer."""
    return quantize_blocks(make_model(), tmp_path / "model.onnx")


def test_inspect_shows_a_graph(graph: Path) -> None:
    """In words, and as one document."""
    done = run_here("inspect", graph)
    assert done.returncode == 0, done.stderr
    for words in ("MatMulNBits int4 g32", "ai.onnx 21", "2 MatMulNBits", "bits per weight"):
        assert words in done.stdout
    document = json.loads(run_here("inspect", graph, "--json").stdout)
    assert document["format"] == "onnx"
    assert document["file"] == str(graph)
    assert LAYER in [layer["name"] for layer in document["layers"]]


def test_verify_says_who_loads_a_graph(graph: Path) -> None:
    """Exit code 0, and 2 with a line where a number cannot be."""
    done = run_here("verify", graph)
    assert done.returncode == 0, done.stderr
    assert "MatMulNBits: yes" in done.stdout
    assert "no problem found" in done.stdout
    model = onnx.load(graph)
    bias = next(each for each in model.graph.initializer if each.name == f"{LAYER}.bias")
    bias.raw_data = b"\xff" * len(bias.raw_data)
    done = run_here("verify", save(model, graph))
    assert done.returncode == 2
    assert f"problem: tensor {LAYER}.bias holds 96 NaN and 0 infinite values" in done.stdout


def test_a_hostile_graph_is_one_line(graph: Path) -> None:
    """Exit code 2; no traceback."""
    model = onnx.load(graph)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    for command in ("inspect", "verify"):
        done = run_here(command, save(model, graph))
        assert done.returncode == 2
        assert "which is refused: it climbs out of the folder" in done.stderr
        assert "Traceback" not in done.stderr
