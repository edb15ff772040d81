"""Jobs that write ONNX graphs beside other formats: one pass over the data for all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantkit
import quantkit.pipeline
from quantkit.recipe import Recipe
from quantkit.records import Event
from tests.formats.onnx.decoder_cases import (
    assert_same_codes,
    run_graph,
    run_transformers,
    some_tokens,
)
from tests.pico_jobs import count_walks, make_pico_job

EXPORTS = (
    {"format": "compressed-tensors"},
    {"format": "gguf", "type": "Q4_0"},
    {"format": "onnx", "precision": "int4"},
)


def make_job(
    folder: Path, *exports: dict[str, object], output: str = "out", **quantize: object
) -> Recipe:
    """An ungated job on the model in `folder`, which is made if it is not there."""
    settings = {"group_size": 32, **quantize}
    return make_pico_job(folder, exports, family="qwen2", output=output, quantize=settings)


def run(recipe: Recipe) -> None:
    quantkit.quantize(recipe, gate=False, device="cpu")


def test_one_walk_feeds_three_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data goes through the model once; folded norms and corrected biases are in the graph."""
    walks = count_walks(monkeypatch)
    run(make_job(tmp_path, *EXPORTS))
    assert len(walks) == 1

    run(make_job(tmp_path, EXPORTS[0], output="alone"))
    out, weights = tmp_path / "out", "compressed-tensors/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    assert_same_codes(out)
    tokens = some_tokens(40)
    logits = run_transformers(out / "compressed-tensors", tokens)
    assert abs(run_graph(out / "onnx", tokens) - logits).max() <= 1e-3 * abs(logits).max()
    assert {path.name for path in out.iterdir()} >= {"compressed-tensors", "gguf", "onnx"}


def test_a_graph_alone_has_the_codes_that_it_has_beside_others(tmp_path: Path) -> None:
    """The walk goes on with the same weights."""
    run(make_job(tmp_path, *EXPORTS))
    run(make_job(tmp_path, EXPORTS[2], output="alone"))

    for file in ("model.onnx", "model.onnx.data"):
        paths = (tmp_path / folder / "onnx" / file for folder in ("out", "alone"))
        assert len({path.read_bytes() for path in paths}) == 1


def test_a_resumed_job_writes_the_same_graph(tmp_path: Path) -> None:
    """From the blocks that were solved before."""
    whole = make_job(tmp_path, EXPORTS[2])
    run(whole)

    def stop(event: Event) -> None:
        if event.stage == "quantize" and event.done == 2:
            raise KeyboardInterrupt

    again = whole.model_copy(update={"output": str(tmp_path / "again")})
    with pytest.raises((KeyboardInterrupt, quantkit.QuantkitError)):
        quantkit.quantize(again, gate=False, device="cpu", progress=stop)
    run(again)

    first, second = (tmp_path / folder / "onnx" / "model.onnx.data" for folder in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_evidence_lists_the_graph(tmp_path: Path) -> None:
    """Its files with their hashes, its size."""
    run(make_job(tmp_path, EXPORTS[2], method="rtn"))

    evidence = json.loads((tmp_path / "out" / "quantkit.json").read_text())

    [artifact] = evidence["artifacts"]
    assert (artifact["format"], artifact["path"]) == ("onnx", "onnx")
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= artifact["files"].keys()


def test_schemes_can_be_chosen_for_a_graph_alone(tmp_path: Path) -> None:
    """By measured sensitivity, within bits per weight of the graph."""
    recipe = make_job(tmp_path, {"format": "onnx"}, scheme="auto", target_bits=10.0)

    result = quantkit.quantize(recipe, gate=False, device="cpu")

    assert 7.0 < result.artifacts[0].bits_per_weight <= 10.0
    assert len({linear.scheme.name for linear in result.plan.linears}) > 1
    assert result.plan.onnx[0].tensor_bytes == result.artifacts[0].tensor_bytes
