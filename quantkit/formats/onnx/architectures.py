"""The decoders that onnxruntime-genai's builder of graphs was found to build right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """What builds the graph of an architecture.

    builder: name of a class in `onnxruntime_genai.models.builders`. model_type: what
    genai_config.json calls the model; None: what the builder makes of the architecture's name.
    """

    builder: str
    model_type: str | None = None


_PHI3 = "Phi3ForCausalLM"

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": Architecture("LlamaModel"),
        "MistralForCausalLM": Architecture("MistralModel"),
        "Qwen2ForCausalLM": Architecture("QwenModel"),
        "Qwen3ForCausalLM": Architecture("Qwen3Model"),
        "Gemma2ForCausalLM": Architecture("Gemma2Model"),
        "Gemma3ForCausalLM": Architecture("Gemma3Model", "gemma3_text"),
        _PHI3: Architecture("Phi3MiniModel"),
    }
)
"""Name in config.json -> builder, as `create_model` of onnxruntime-genai 0.18 chooses it, but that
Phi-3 is told by its rotary embedding."""

_LONG_PHI3 = Architecture("Phi3MiniLongRoPEModel")


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Return what builds the graph of the model that config.json describes, or None."""
    names = config.get("architectures") or [None]
    ropes = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = ropes.get("rope_type", ropes.get("type"))
    if names[0] == _PHI3 and kind in {"longrope", "su"}:
        return _LONG_PHI3
    return ARCHITECTURES.get(names[0])
