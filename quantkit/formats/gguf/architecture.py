"""What llama.cpp calls the architecture of a model, and the numbers that it must know of it.

Sources: conversion/*.py of llama.cpp (commit 0c1e570), which writes these keys, and
src/models/*.cpp, which reads them. What llama.cpp would compute differently from transformers,
without a word, is refused here, or noted where it only concerns texts longer than a sliding window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import read_config
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.header import Value
from quantkit.ggml_types import FileType

QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION of ggml.h: which layout of blocks the file has."""

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "gemma2": "gemma2",
        "gemma3_text": "gemma3",
        "llama": "llama",
        "mistral": "llama",
        "phi3": "phi3",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
    }
)
"""`model_type` of config.json -> `general.architecture` of the file."""

_ROPE_TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gemma2": ("default",),
        "gemma3": ("default", "linear"),
        "llama": ("default", "linear", "yarn", "llama3"),
        "phi3": ("default", "longrope"),
        "qwen2": ("default", "linear", "yarn"),
        "qwen3": ("default", "linear", "yarn"),
    }
)
_SLIDING_PERIOD: Mapping[str, int] = MappingProxyType({"gemma2": 2, "gemma3": 6})
"""Every which layer sees the whole context: llama.cpp knows it by the architecture."""
_LARGEST_LAYERS: Mapping[str, int] = MappingProxyType({"gemma2": 46, "gemma3": 62})
"""Layers of the 27B models, whose queries llama.cpp scales by the model's width."""
_SQUARE_ATTENTION = frozenset({"phi3", "qwen2"})
"""Where llama.cpp takes the heads to fill the width of the model."""
_DEFAULT_THETA = 10000.0
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")
_ROPE_CHOICES = ("original_max_position_embeddings", "beta_fast", "beta_slow")
_OWN_STRETCHING = frozenset({"attention_factor", "mscale", "mscale_all_dim"})
"""What would change attention's scale; llama.cpp computes its own, whatever the file says."""


@dataclass(frozen=True)
class Architecture:
    """One model as llama.cpp sees it."""

    name: str
    """`general.architecture`, the prefix of its keys."""
    config: Mapping[str, Any]
    """transformers' config, with its defaults filled in."""
    blocks: int
    heads: int
    key_value_heads: int
    head_dim: int
    hidden: int
    rope: Mapping[str, Any]
    """Settings of the rotary embedding: `rope_type`, `rope_theta` and what the type needs."""
    sliding_rope: Mapping[str, Any] | None
    """Those of the layers with a sliding window, where they have their own."""

    @property
    def rotated(self) -> int:
        """Channels of a head that the rotary embedding turns."""
        if self.name == "phi3":
            share = float(self.rope.get("partial_rotary_factor", 1.0))
            return int(share * self.hidden) // self.heads
        return self.head_dim

    @property
    def extended(self) -> float:
        """How many times longer the context is than the one the rotary embedding was trained on."""
        return float(self.config["max_position_embeddings"]) / self.original_context

    @property
    def original_context(self) -> int:
        """Tokens of the context before the rotary embedding was stretched."""
        key = "original_max_position_embeddings"
        original = self.rope.get(key) or self.config.get(key)
        return int(original or self.config["max_position_embeddings"])


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return what llama.cpp must know of a checkpoint.

    Raises:
        CheckpointError: its architecture is not built, transformers refuses the config, or
            llama.cpp cannot compute what the config says; every fault is named.
    """
    place = f"{checkpoint.source.name}: config.json"
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{place}: GGUF files of model_type {model_type!r} are not built; built are "
            f"{', '.join(ARCHITECTURES)}"
        )
    config: dict[str, Any] = read_config(checkpoint).to_dict()
    full, sliding = _split_rope(config)
    if faults := list(_find_wrong_numbers(config, full, sliding or {})):
        raise CheckpointError(f"{place}: {'; '.join(faults)}")
    heads = int(config["num_attention_heads"])
    architecture = Architecture(
        name=ARCHITECTURES[model_type],
        config=MappingProxyType(config),
        blocks=int(config["num_hidden_layers"]),
        heads=heads,
        key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        hidden=int(config["hidden_size"]),
        rope=MappingProxyType(full),
        sliding_rope=None if sliding is None else MappingProxyType(sliding),
    )
    if faults := list(_find_faults(architecture)):
        raise CheckpointError(f"{place}: {'; '.join(faults)}")
    return architecture


def note_differences(architecture: Architecture) -> tuple[str, ...]:
    """Say where llama.cpp will compute something else, depending on the length of the text."""
    notes = []
    window = architecture.config.get("sliding_window")
    slides = architecture.config.get("layer_types") is None or _slides(architecture)
    longest = int(architecture.config["max_position_embeddings"])
    if architecture.name not in _SLIDING_PERIOD and slides and window and int(window) < longest:
        notes.append(
            f"llama.cpp has no sliding window for {architecture.name}: beyond {window} tokens the "
            "GGUF file attends to the whole text, the original does not"
        )
    if architecture.rope["rope_type"] == "longrope":
        notes.append(
            "llama.cpp takes the long factors of longrope by the size of its context, the original "
            f"by the length of the text: give a context of {architecture.original_context} tokens "
            "at the most for texts that fit into it"
        )
    return tuple(notes)


def describe_architecture(
    architecture: Architecture, parameters: int, name: str, file_type: FileType
) -> dict[str, Value]:
    """Return the metadata of a file, without the tokenizer.

    Args:
        parameters: weights of all tensors of the file.
        name: what people call the model.
    """
    prefix = architecture.name
    entries: dict[str, str | int | float] = {
        "general.architecture": prefix,
        "general.type": "model",
        "general.name": name,
        "general.size_label": label_size(parameters),
    }
    for part in (_describe_sizes, _describe_attention, _describe_rope):
        entries |= {f"{prefix}.{key}": content for key, content in part(architecture)}
    entries["general.file_type"] = file_type.number
    entries["general.quantization_version"] = QUANTIZATION_VERSION
    kinds = {str: "string", int: "uint32", float: "float32"}
    return {key: Value(kinds[type(content)], content) for key, content in entries.items()}


def label_size(parameters: int) -> str:
    """Return a number of weights as people say it, with two digits at least: `1.2B`, `112K`."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters > unit or suffix == "K":
            break
    scaled = parameters / unit
    whole = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - whole, 0)}f}{suffix}"


def _describe_sizes(architecture: Architecture) -> Iterator[tuple[str, int]]:
    config = architecture.config
    yield "block_count", architecture.blocks
    yield "context_length", int(config["max_position_embeddings"])
    yield "embedding_length", architecture.hidden
    yield "feed_forward_length", int(config["intermediate_size"])
    if architecture.name == "llama":
        yield "vocab_size", int(config["vocab_size"])


def _describe_attention(architecture: Architecture) -> Iterator[tuple[str, int | float]]:
    config, name = architecture.config, architecture.name
    yield "attention.head_count", architecture.heads
    yield "attention.head_count_kv", architecture.key_value_heads
    yield "attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"])
    # The converter leaves these out where the config has no head_dim of its own.
    if name in _SLIDING_PERIOD or (name != "phi3" and config.get("head_dim") is not None):
        yield "attention.key_length", architecture.head_dim
        yield "attention.value_length", architecture.head_dim
    if name == "gemma2":
        yield "attn_logit_softcapping", float(config["attn_logit_softcapping"])
    if name in _SLIDING_PERIOD and config.get("final_logit_softcapping"):
        yield "final_logit_softcapping", float(config["final_logit_softcapping"])
    if name == "phi3":
        yield "attention.sliding_window", int(config.get("sliding_window") or 0)
    elif name in _SLIDING_PERIOD and _slides(architecture):
        yield "attention.sliding_window", int(config["sliding_window"])


def _describe_rope(architecture: Architecture) -> Iterator[tuple[str, str | int | float]]:
    name, rope = architecture.name, architecture.rope
    theta = float(rope["rope_theta"])
    if name in ("llama", "phi3"):
        yield "rope.dimension_count", architecture.rotated
    if name != "gemma2" or theta != _DEFAULT_THETA:
        yield "rope.freq_base", theta
    if architecture.sliding_rope is not None:
        yield "rope.freq_base_swa", float(architecture.sliding_rope["rope_theta"])
    if name == "phi3":
        yield "rope.scaling.original_context_length", architecture.original_context
        if rope["rope_type"] != "default":
            yield "rope.scaling.attn_factor", _long_rope_attention(architecture)
    if rope["rope_type"] in ("linear", "yarn"):
        yield "rope.scaling.type", str(rope["rope_type"])
        yield "rope.scaling.factor", float(rope["factor"])
    if rope["rope_type"] == "yarn":
        yield "rope.scaling.original_context_length", architecture.original_context
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                yield f"rope.scaling.yarn_{key}", float(rope[key])


def _long_rope_attention(architecture: Architecture) -> float:
    """LongRoPE's factor on attention (arXiv 2402.13753, as transformers computes it)."""
    scale = architecture.extended
    if scale <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scale) / math.log(architecture.original_context))


def _slides(architecture: Architecture) -> bool:
    return "sliding_attention" in (architecture.config.get("layer_types") or ())


def _split_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the rotary settings of the full layers, and those of sliding layers of their own.

    transformers 5 keeps them in `rope_parameters`, by kind of layer in some models; it moves the
    `rope_theta` and `rope_scaling` of older configs there itself.
    """
    rope = dict(config.get("rope_parameters") or {})
    full = dict(rope.get("full_attention", rope))
    sliding = rope.get("sliding_attention")
    full.setdefault("rope_type", full.get("type", "default"))
    full.setdefault("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
    return full, None if sliding is None else dict(sliding)


def _find_wrong_numbers(
    config: Mapping[str, Any], full: Mapping[str, Any], sliding: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the settings that are no numbers of their kind: transformers lets some of them pass."""
    for key in _COUNTS:
        if key in config and not _is_count(config[key]):
            yield f"{key} is {config[key]!r}, which is no count"
    if config.get("sliding_window") is not None and not _is_count(config["sliding_window"]):
        yield f"sliding_window is {config['sliding_window']!r}, which is no count"
    settings = [("rms_norm_eps", config.get("rms_norm_eps"))]
    for rope in (full, sliding):
        settings += [(key, rope[key]) for key in _ROPE_NUMBERS if key in rope]
        settings += [(key, rope[key]) for key in _ROPE_CHOICES if rope.get(key) is not None]
    for key, value in settings:
        if not _is_positive(value):
            yield f"{key} is {value!r}, which is no positive number"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _find_faults(architecture: Architecture) -> Iterator[str]:
    """Yield what llama.cpp cannot compute as transformers does."""
    config, name, rope = architecture.config, architecture.name, architecture.rope
    gemma = name in _SLIDING_PERIOD
    activation = config.get("hidden_activation" if gemma else "hidden_act")
    expected = "gelu_pytorch_tanh" if gemma else "silu"
    if activation != expected:
        yield f"llama.cpp computes {name} with the activation {expected}, not {activation}"
    if rope["rope_type"] not in _ROPE_TYPES[name]:
        yield (
            f"rope_type {rope['rope_type']!r} is not built for {name}; built are "
            f"{', '.join(_ROPE_TYPES[name])}"
        )
    if name != "phi3" and float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        yield f"llama.cpp turns whole heads of {name}: partial_rotary_factor must be 1"
    if name in _SQUARE_ATTENTION and architecture.heads * architecture.head_dim != (
        architecture.hidden
    ):
        yield (
            f"llama.cpp takes the {architecture.heads} heads of {name} to fill hidden_size "
            f"{architecture.hidden}, but head_dim is {architecture.head_dim}"
        )
    if stretched := _OWN_STRETCHING & {key for key, value in rope.items() if value is not None}:
        yield f"{', '.join(sorted(stretched))} of rope_type {rope['rope_type']} is not built"
    if rope.get("truncate") is False:
        yield "llama.cpp rounds the bounds of yarn: truncate must be true"
    if gemma:
        yield from _find_gemma_faults(architecture)


def _find_gemma_faults(architecture: Architecture) -> Iterator[str]:
    config, name = architecture.config, architecture.name
    largest = architecture.blocks == _LARGEST_LAYERS[name]
    scalar = architecture.hidden // architecture.heads if largest else architecture.head_dim
    if config.get("query_pre_attn_scalar") != scalar:
        yield (
            f"llama.cpp scales the queries of this {name} by {scalar} ** -0.5, "
            f"query_pre_attn_scalar is {config.get('query_pre_attn_scalar')}"
        )
    if _slides(architecture) and config.get("sliding_window") is None:
        yield "there are layers with a sliding window, but sliding_window is not set"
    period = _SLIDING_PERIOD[name]
    expected = [
        "full_attention" if index % period == period - 1 else "sliding_attention"
        for index in range(architecture.blocks)
    ]
    unsliding = name == "gemma3" and not _slides(architecture)
    if config.get("layer_types") != expected and not unsliding:
        yield f"llama.cpp takes every {period}th layer of {name} to see the whole context, no other"
    if config.get("use_bidirectional_attention"):
        yield f"llama.cpp computes {name} with causal attention"
    soft_cap = config.get("attn_logit_softcapping")
    if (soft_cap is None) == (name == "gemma2"):
        yield f"llama.cpp does not compute {name} with attn_logit_softcapping {soft_cap}"
    if name == "gemma2" and not config.get("final_logit_softcapping"):
        yield "llama.cpp does not compute gemma2 without final_logit_softcapping"
    sliding = architecture.sliding_rope
    if sliding is not None and sliding.get("rope_type", "default") != "default":
        yield f"rope_type {sliding['rope_type']!r} is not built for layers with a sliding window"
