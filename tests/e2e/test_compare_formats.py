"""One comparison over three formats: each in its runtime, which adds no more than its own noise."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from statistics import fmean

import pytest

import quantkit
from quantkit.calibration.data import load_tokenizer
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.job_windows import load_evaluation
from quantkit.judging.evaluate import evaluate
from quantkit.recipe import GateSpec
from quantkit.records import TokenWindows
from tests.helpers import pico_text
from tests.pico_jobs import make_pico_job

EXPORTS = (
    {"format": "compressed-tensors"},
    {"format": "gguf", "type": "Q4_0"},
    {"format": "onnx"},
)
GATE = {"samples": 8, "max_samples": 8, "sequence_length": 32, "timeout_seconds": 120}

MARGIN = 1.25
"""The noise of the same kernels on other weights, at the most; seen was 1.004 times the floor."""
ROUNDING = 1e-9
"""KL of float32 sums in another order, at the most."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of one job, the model in Q8_0, and a text."""
    folder = tmp_path_factory.mktemp("formats")
    quantize = {"scheme": "w4a16", "group_size": 32, "method": "rtn", "effort": "fast"}
    job = make_pico_job(folder, EXPORTS, quantize=quantize)
    quantkit.quantize(job, gate=False, device="cpu")
    quantkit.convert(folder / "model", to="gguf:Q8_0", output=folder / "plain")
    (folder / "text.txt").write_text(pico_text(600, seed=3))
    return folder


def load_windows(made: Path) -> TokenWindows:
    """The windows of the comparison."""
    checkpoint = open_checkpoint(resolve_source(str(made / "model")))
    spec = GateSpec(data=str(made / "text.txt"), **GATE)
    return load_evaluation(spec, load_tokenizer(made / "model"), checkpoint)


def mean_kl(baseline: Path, candidate: Path, windows: TokenWindows, runtime: str) -> float:
    """Of a folder in transformers to an artifact in its runtime."""
    return fmean(evaluate(baseline, candidate, windows, runtime=runtime, device="cpu").kl)


def find_file(folder: Path) -> Path:
    """The model among GGUF files."""
    (file,) = (path for path in folder.rglob("*.gguf") if path.name != "imatrix.gguf")
    return file


@pytest.mark.slow
def test_a_runtime_adds_no_more_than_its_own_noise(made: Path, tmp_path: Path) -> None:
    """The floor of llama.cpp's kernels is that of the model in Q8_0; graphs compute in float32."""
    packed, graph, file = (
        made / "out" / "compressed-tensors",
        made / "out" / "onnx",
        find_file(made / "out"),
    )
    report = quantkit.compare(
        made / "model",
        [packed, file, graph],
        data=made / "text.txt",
        output=tmp_path / "out",
        overrides=["gate.probes=null", *(f"gate.{key}={value}" for key, value in GATE.items())],
        device="cpu",
        footprint=False,
    )
    windows = load_windows(made)
    of_packed, of_file, of_graph = (row.judgement for row in report.artifacts)
    for each in (of_packed, of_file, of_graph):
        assert each.kl is not None
        assert each.details is not None
        assert sorted(each.details.windows) == list(range(8))
    assert [row.runtime for row in report.artifacts] == ["transformers", "llama.cpp", "onnxruntime"]
    assert [len(report.differences), report.differences[0].windows] == [3, 8]
    # Graph and folder hold the same codes.
    assert abs(sqrt(of_graph.kl.value) - sqrt(of_packed.kl.value)) < sqrt(ROUNDING)
    assert mean_kl(packed, graph, windows, "onnxruntime") < ROUNDING

    found = {}
    for name, each in (("file", file), ("floor", find_file(made / "plain"))):
        exact = tmp_path / name
        quantkit.convert(each, to="safetensors", dtype="float32", base=made / "model", output=exact)
        found[name] = mean_kl(exact, each, windows, "llama.cpp")
    assert 0 < found["file"] < MARGIN * found["floor"]
