"""One job, three formats, each judged in a runtime that serves it."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantkit
from tests.cli.running import ROOT

MODEL = ROOT / "models" / "demo-llama"
SETTINGS = (
    "calibration.samples=8",
    "calibration.sequence_length=128",
    "gate.samples=8",
    "gate.sequence_length=128",
    "gate.probes.max_new_tokens=8",
    "gate.max_perplexity_increase=100%",
    "gate.max_kl=1",
    "gate.min_top1_agreement=50%",
    "export=[{format: compressed-tensors}, {format: gguf, type: Q4_0}, {format: onnx}]",
)


@pytest.mark.slow
def test_each_format_is_judged_in_a_runtime_of_its_own(tmp_path: Path) -> None:
    """ONNX graph and compressed-tensors artifact hold the same codes, so they diverge alike: what
    is left is the order of sums."""
    report = quantkit.quantize(
        "onnx-int4", model=MODEL, output=tmp_path / "out", overrides=SETTINGS, device="cpu"
    ).report

    assert report.verdict == "PASS"
    assert {each.format: each.runtime for each in report.artifacts} == {
        "compressed-tensors": "transformers",
        "gguf": "llama.cpp",
        "onnx": "onnxruntime",
    }
    found = {each.format: each.judgement.kl for each in report.artifacts}
    ours, theirs = found["onnx"], found["compressed-tensors"]
    assert ours is not None
    assert theirs is not None
    assert ours.value == pytest.approx(theirs.value, rel=1e-3)
