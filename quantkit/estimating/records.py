"""What an estimate says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightEstimate:
    """The weights of the model in one format."""

    name: str
    """FP32, BF16, a scheme, or a GGUF type."""
    format: str
    """safetensors, compressed-tensors or gguf."""
    size_bytes: int
    bits_per_weight: float
    note: str = ""


@dataclass(frozen=True)
class CacheEstimate:
    """Keys and values of sequences that are all as long as the context."""

    context: int
    sequences: int
    bytes_16bit: int
    bytes_fp8: int


@dataclass(frozen=True)
class GpuEstimate:
    """How many GPUs of a kind hold one format and its cache, and what they cost."""

    gpu: str
    weights: str
    """A name of the weights."""
    count: int | None
    """The smallest of 1, 2, 4, 8 that suffices; None: eight do not."""
    monthly_price: float | None
    """US dollars for 730 hours; None: too few GPUs, or no price is known."""


@dataclass(frozen=True)
class Estimate:
    """A planning approximation for one model, from its config or its number of weights alone."""

    model: str
    parameters: int
    weights: tuple[WeightEstimate, ...]
    context: int | None
    """Tokens of each sequence for which GPUs are counted; None: the config is not known."""
    concurrency: int
    caches: tuple[CacheEstimate, ...]
    gpus: tuple[GpuEstimate, ...]
    prices: str
    """Where prices come from, and of when."""
    notes: tuple[str, ...]
