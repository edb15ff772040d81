"""What `inspect` finds in an artifact or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.records import Verdict


@dataclass(frozen=True)
class InspectedLayer:
    """One matrix of the model as it is stored."""

    name: str
    scheme: str
    """quantkit's name of the scheme where it has one; `none` for floating point."""
    group_size: int | None
    """Columns that share a scale; None: `sharing` says what does."""
    bits: int
    """Bits of one stored weight, scales not counted."""
    shape: tuple[int, ...]
    """Of the weight, [O, I]."""
    size: int
    """Bytes of all tensors of the layer, scales included, bias not."""
    sharing: str = "none"
    """What shares a scale: `group`, `channel`, `tensor`, `block`, or `none` for no scales."""


@dataclass(frozen=True)
class Inspection:
    """What an artifact holds."""

    folder: Path
    """Where the weights are, and config.json where the format has one."""
    format: str
    scheme: str
    """The schemes of the quantized layers in a few words, most used first; or `none`."""
    architecture: str
    layers: tuple[InspectedLayer, ...]
    tensors: Mapping[str, int]
    """dtype -> number of tensors."""
    parameters: int
    """Weights of the model; scales, zero points and shapes do not count."""
    tensor_bytes: int
    bits_per_weight: float
    """8 * tensor_bytes / parameters."""
    quantization_config: Mapping[str, Any] | None
    kv_cache: str
    """Of the key/value cache: `none`, `fp8`, `fp8_per_head`, or what config.json says of it."""
    verdict: Verdict | None
    """The gate's, where quantkit.json lies beside and has one."""
    problems: tuple[str, ...]
    """What is wrong with the artifact, one line each."""
    file: Path | None = None
    """The ONNX file, or the GGUF file or its first part; None for the formats that are folders."""
    details: Mapping[str, str] = field(default_factory=dict)
    """What else people ask of the format: what -> in words."""
