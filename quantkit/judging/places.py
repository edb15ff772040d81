"""Which runtime each of the two models runs in; light to import."""

from __future__ import annotations

LLAMA_CPP = "llama.cpp"
ONNX_RUNTIME = "onnxruntime"

_OTHER_BASELINES = frozenset({LLAMA_CPP, ONNX_RUNTIME})
"""Runtimes that load no checkpoints: their baselines run in transformers."""


def find_baseline_runtime(runtime: str) -> str:
    """Return what the baseline of a candidate in `runtime` runs in: the same, or transformers."""
    return "transformers" if runtime in _OTHER_BASELINES else runtime
