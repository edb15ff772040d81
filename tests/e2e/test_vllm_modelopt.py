"""ModelOpt's layout in vLLM's own reader: `make vllm` runs these."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import quantkit
from tests.e2e.test_vllm_gate import MODEL, judge

pytestmark = pytest.mark.vllm

READ = """
import json, sys
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config
found = []
for path in sys.argv[1:]:
    with open(path) as file:
        config = json.load(file)
    read = ModelOptFp8Config.from_config(config.get("quantization_config", config))
    names = ("lm_head", "model.layers.0.mlp.down_proj")
    excluded = [read.is_layer_excluded(name) for name in names]
    found.append([read.quant_method, read.kv_cache_quant_method, excluded])
print("FOUND", json.dumps(found))
"""
"""What vLLM's reader makes of either description."""


def quantize(output: Path, scheme: str, *settings: str) -> Path:
    """Write the layout by plain rounding; return its folder."""
    overrides = [
        f"quantize.scheme={scheme}",
        "quantize.method=rtn",
        "calibration.samples=8",
        "export=[{format: modelopt}]",
        *settings,
    ]
    quantkit.quantize(
        "demo", model=MODEL, output=output, overrides=overrides, gate=False, device="cpu"
    )
    return output / "modelopt"


def test_vllm_and_transformers_measure_the_same(tmp_path: Path) -> None:
    """vLLM loads the folder itself; transformers the same codes in another layout."""
    artifact = quantize(tmp_path / "out", "fp8_dynamic")
    emulated = judge(artifact, tmp_path / "transformers")
    python = os.environ["QUANTKIT_VLLM_PYTHON"]
    settings = ["gate.runtime=vllm", f"gate.python.vllm={python}"]
    served = judge(artifact, tmp_path / "vllm", *settings)
    assert any("TensorRT-LLM itself was not run" in note for note in emulated.notes)
    assert not any("TensorRT-LLM" in note for note in served.notes)
    ours, theirs = (report.artifacts[0].judgement.kl for report in (emulated, served))
    assert ours is not None
    assert theirs is not None
    assert theirs.value == pytest.approx(ours.value, abs=0.0013)


def test_vllm_reads_both_descriptions(tmp_path: Path) -> None:
    """The algorithm, the cache and what is excluded."""
    folder = quantize(tmp_path / "out", "fp8_static", "quantize.kv_cache=fp8")
    files = [str(folder / name) for name in ("config.json", "hf_quant_config.json")]
    done = subprocess.run(
        [os.environ["QUANTKIT_VLLM_PYTHON"], "-c", READ, *files],
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(each for each in done.stdout.splitlines() if each.startswith("FOUND "))
    assert json.loads(line.removeprefix("FOUND ")) == [["FP8", "FP8", [True, False]]] * 2
