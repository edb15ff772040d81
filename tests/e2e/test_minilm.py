"""The shipped recipe on a real sentence encoder: `make minilm` brings it and runs these."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import quantkit

pytestmark = pytest.mark.minilm


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return Path(os.environ["QUANTKIT_MINILM"])


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static"])
def test_int8_keeps_the_embeddings_and_their_neighbours(
    model: Path, tmp_path: Path, scheme: str
) -> None:
    """In a quarter of the float32 bytes, and faster than the float32 graph."""
    result = quantkit.quantize(
        "onnx-int8-encoder",
        model=model,
        output=tmp_path / "out",
        overrides=[
            f"quantize.scheme={scheme}",
            "gate.min_cosine=0.995",
            "gate.min_retrieval_overlap=93%",
        ],
        device="cpu",
    )

    assert result.verdict == "PASS"
    graph = tmp_path / "out" / "onnx" / "model.onnx"
    assert graph.stat().st_size <= 0.26 * (model / "model.safetensors").stat().st_size
    (speed,) = result.report.artifacts[0].judgement.speed
    assert speed.artifact > speed.baseline
