"""Graphs that do not compute what transformers does are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import ArtifactError, PlanError
from quantkit.formats.onnx import agreement
from quantkit.formats.onnx.agreement import TOLERANCES, check_agreement
from quantkit.formats.onnx.decoder import plan_decoder
from quantkit.formats.onnx.decoder_files import WrittenGraph, write_float_files
from quantkit.recipe import ExportSpec
from quantkit.records import OnnxPlan
from tests.formats.onnx.decoder_cases import run_job
from tests.helpers import make_pico_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
ONNX = ExportSpec(format="onnx")


def make_checkpoint(folder: Path, ropes: dict[str, object], family: str = "llama") -> Checkpoint:
    """A model with other keys in its config's rope_parameters."""
    model = make_pico_model(folder / "model", family=family, max_positions=1024)
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= ropes
    path.write_text(json.dumps(config))
    return open_checkpoint(resolve_source(str(model)))


@pytest.mark.parametrize("activations", ["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_graphs_differ_by_far_less_than_is_tolerated(
    tmp_path: Path, family: str, activations: str
) -> None:
    """Local and global layers, a window, a cache that is gone on with; nothing is left behind."""
    layers = 7 if family == "gemma3_text" else 3
    model = make_pico_model(tmp_path / "model", family=family, layers=layers, tied=False)
    folder = tmp_path / "out"
    folder.mkdir()

    difference = check_agreement(open_checkpoint(resolve_source(str(model))), folder, activations)

    assert difference < TOLERANCES[activations] / 5
    assert not list(folder.iterdir())


def test_frequencies_that_are_scaled_by_parts_agree(tmp_path: Path) -> None:
    """Llama 3's, over the whole context."""
    ropes = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }

    assert plan_decoder(make_checkpoint(tmp_path, ropes), ONNX).tensor_bytes > 0


def test_phi3_with_two_sets_of_frequencies_agrees(tmp_path: Path) -> None:
    """The graph chooses between them by the length of the text."""
    ropes = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * step for step in range(8)],
        "long_factor": [2.0 + 0.2 * step for step in range(8)],
        "original_max_position_embeddings": 64,
    }
    checkpoint = make_checkpoint(tmp_path, ropes, family="phi3")
    path = tmp_path / "model" / "config.json"
    config = {**json.loads(path.read_text()), "original_max_position_embeddings": 64}
    path.write_text(json.dumps(config))

    checkpoint = open_checkpoint(checkpoint.source)
    assert check_agreement(checkpoint, tmp_path) < TOLERANCES["fp32"] / 100


@pytest.mark.parametrize(
    ("ropes", "message"),
    [
        ({"rope_type": "linear", "factor": 4.0}, "another rotary embedding than transformers"),
        ({"rope_type": "yarn", "factor": 4.0}, "another rotary embedding than transformers"),
    ],
)
def test_another_rotary_embedding_is_refused_before_any_work(
    tmp_path: Path, ropes: dict[str, object], message: str
) -> None:
    """The builder does not know these for Llama and says nothing."""
    with pytest.raises(PlanError, match=message):
        plan_decoder(make_checkpoint(tmp_path, ropes), ONNX)


def test_what_the_builder_cannot_make_is_said_before_any_work(tmp_path: Path) -> None:
    """In one line."""
    checkpoint = make_checkpoint(tmp_path, {"rope_type": "yarn", "factor": 4.0}, family="qwen2")

    with pytest.raises(ArtifactError, match=r"cannot build a graph of .*division by zero"):
        plan_decoder(checkpoint, ONNX)


def test_a_graph_that_drifts_is_not_written(tmp_path: Path) -> None:
    """Gemma 3's local layers, whose frequencies the builder scales with the global ones."""
    model = make_pico_model(tmp_path / "model", family="gemma3_text", layers=7)
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    path.write_text(json.dumps(config))

    with pytest.raises(ArtifactError, match=r"logits differ by \d.* more than 1e-03; no graph"):
        check_agreement(open_checkpoint(resolve_source(str(model))), tmp_path)
    with pytest.raises(PlanError, match="of sliding_attention layers"):
        run_job(model, tmp_path / "out", {"format": "onnx"})
    assert not (tmp_path / "out").exists()


def test_a_graph_that_the_runtime_cannot_read_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its exceptions it raises."""

    def tear(checkpoint: Checkpoint, plan: OnnxPlan, folder: Path) -> WrittenGraph:
        written = write_float_files(checkpoint, plan, folder)
        os.truncate(folder / "model.onnx", 1000)
        return written

    monkeypatch.setattr(agreement, "write_float_files", tear)
    model = make_pico_model(tmp_path / "model")

    with pytest.raises(ArtifactError, match=r"^ONNX Runtime cannot run the graph: [^\n]+$"):
        check_agreement(open_checkpoint(resolve_source(str(model))), tmp_path)
