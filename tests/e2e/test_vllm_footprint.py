"""What the demo model takes in vLLM: `make vllm` runs this with the interpreter of vLLM's own."""

from __future__ import annotations

import os

import pytest

from quantkit.judging.footprint import measure_footprint
from tests.cli.running import ROOT


@pytest.mark.vllm
def test_vllm_is_timed_step_by_step() -> None:
    """A prompt is one step of its engine, and each token behind it another."""
    found = measure_footprint(
        ROOT / "models" / "demo-llama",
        "vllm",
        quantized=False,
        repetitions=3,
        python=os.environ["QUANTKIT_VLLM_PYTHON"],
    )

    assert found.runtime.startswith("vllm 0.")
    assert found.what.startswith("weights as vLLM's kernels take them, a prompt of 256 tokens")
    assert found.load_seconds > 0
    assert found.memory_bytes is not None
    assert found.prefill is not None
    assert found.decoding is not None
    assert found.prefill > found.decoding > 0
