"""The gate in vLLM: `make vllm` runs these with the interpreter of vLLM's own environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import quantkit
from quantkit.recipe import load_recipe
from tests.cli.running import ROOT

pytestmark = pytest.mark.vllm

MODEL = ROOT / "models" / "demo-llama"
TEXT = ROOT / "calib_data" / "docs_evaluation.txt"


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that has vLLM."""
    return os.environ["QUANTKIT_VLLM_PYTHON"]


def judge(artifact: Path, output: Path, *settings: str) -> quantkit.Report:
    """Judge on a few windows."""
    overrides = ("gate.samples=16", "gate.sequence_length=256", *settings)
    return quantkit.gate(
        artifact, baseline=MODEL, data=TEXT, output=output, overrides=overrides, device="cpu"
    )


@pytest.mark.parametrize(("kv_cache", "tolerance"), [("none", 0.0013), ("fp8", 0.005)])
def test_vllm_and_transformers_measure_the_same(
    tmp_path: Path, kv_cache: str, tolerance: float, python: str
) -> None:
    """With the cache in FP8 too.

    vLLM computes in bfloat16, which alone costs this model about 1e-4 nats a token. Its CPU build
    truncates to FP8 where its GPU kernels, and transformers, round to nearest: seen to cost this
    model 0.003 nats.
    """
    settings = ["calibration.samples=8", f"quantize.kv_cache={kv_cache}", "quantize.method=rtn"]
    quantkit.quantize(
        "demo",
        model=MODEL,
        output=tmp_path / "out",
        overrides=settings,
        gate=False,
        device="cpu",
    )
    artifact = tmp_path / "out" / "compressed-tensors"
    emulated = judge(artifact, tmp_path / "transformers")
    settings = ["gate.runtime=vllm", f"gate.python.vllm={python}"]
    served = judge(artifact, tmp_path / "vllm", *settings)
    row = served.artifacts[0]
    assert row.runtime == "vllm"
    assert row.judgement.measured_with.get("kv_cache") == (None if kv_cache == "none" else "fp8")
    ours, theirs = (report.artifacts[0].judgement.kl for report in (emulated, served))
    assert ours is not None
    assert theirs is not None
    assert theirs.value == pytest.approx(ours.value, abs=tolerance)


def test_an_artifact_that_vllm_cannot_load_fails(tmp_path: Path, python: str) -> None:
    """vLLM's CPU build has no kernel for eight-bit weights with 16-bit activations."""
    assert load_recipe("w8a16").quantize.scheme == "w8a16"
    quantkit.quantize("w8a16", model=MODEL, output=tmp_path / "out", gate=False, device="cpu")
    settings = ["gate.runtime=vllm", f"gate.python.vllm={python}"]
    report = judge(tmp_path / "out" / "compressed-tensors", tmp_path / "report", *settings)
    assert report.verdict == "FAIL"
    assert "the candidate's worker failed at 'load'" in report.artifacts[0].judgement.reasons[0]
