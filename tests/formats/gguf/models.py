"""Models of every architecture that GGUF files are built of, as small as they can be.

Their weights are counted, not drawn, so that they are the same wherever a golden table was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.records import Source, TensorInfo
from tests.helpers import make_pico_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "long_factor": [1.0, 1.125, 1.25, 1.5, 2.0, 3.0],
    "short_factor": [1.0, 1.0, 1.0, 1.0625, 1.125, 1.25],
}
_WIDE = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 320}
_GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2}
_EQUAL = {"num_attention_heads": 4, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Case:
    """A pico model: what `make_pico_model` takes, and what its config says instead."""

    family: str
    model: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Keys that the config does not have."""
    biases: tuple[str, ...] = ()
    """Layers that have a bias; transformers reads them where the config says so."""


CASES: Mapping[str, Case] = {
    "llama": Case("llama", {"tied": False, "dtype": "float32"}),
    "llama3": Case(
        "llama", {"hidden": 128}, {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}}
    ),
    "llama3-older": Case(
        "llama",
        {"hidden": 128},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
        ("rope_parameters",),
    ),
    "llama-biases": Case(
        "llama",
        {"dtype": "float16"},
        {"attention_bias": True, "mlp_bias": True},
        biases=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "llama-linear": Case(
        "llama",
        {},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ("rope_parameters",),
    ),
    "mistral": Case("mistral", {}, {"sliding_window": 128}, ("head_dim",)),
    "qwen2": Case("qwen2", {}, {}, ("head_dim",)),
    "qwen2-yarn": Case(
        "qwen2",
        {"tied": False},
        {
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        ("rope_parameters",),
    ),
    "qwen3": Case("qwen3"),
    "gemma2": Case("gemma2", {}, {"query_pre_attn_scalar": 16}),
    "gemma3": Case(
        "gemma3_text",
        {"layers": 7},
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 1000000.0,
                    "factor": 8.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": Case("phi3", {"tied": False}),
    "phi3-long": Case(
        "phi3",
        {"tied": False},
        {
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 128,
            "sliding_window": 128,
            "rope_scaling": {"type": "longrope", **LONG_ROPE},
        },
        ("rope_parameters",),
    ),
}
"""Those of the golden table `architectures.json`."""

MIXED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-6": (
        "llama",
        {
            "hidden_size": 256,
            "intermediate_size": 768,
            "vocab_size": 4096,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "llama-32-grouped": ("llama", {**_WIDE, **_GROUPED, "num_hidden_layers": 32}),
    "llama-80-grouped": ("llama", {**_WIDE, **_GROUPED, "num_hidden_layers": 80}),
    "llama-80": ("llama", {**_WIDE, **_EQUAL, "num_hidden_layers": 80}),
    "llama-288-columns": (
        "llama",
        {
            "hidden_size": 288,
            "intermediate_size": 320,
            "vocab_size": 320,
            "num_hidden_layers": 9,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "llama-48-columns": (
        "llama",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "vocab_size": 320,
            "num_hidden_layers": 9,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "qwen2-80": ("qwen2", {**_WIDE, **_EQUAL, "num_hidden_layers": 80}),
    "qwen3-16": (
        "qwen3",
        {
            **_WIDE,
            **_GROUPED,
            "head_dim": 32,
            "num_hidden_layers": 16,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-17": (
        "gemma3_text",
        {
            **_WIDE,
            **_GROUPED,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 17,
            "tie_word_embeddings": True,
        },
    ),
    "phi3-24": ("phi3", {**_WIDE, **_EQUAL, "num_hidden_layers": 24, "pad_token_id": 2}),
}
"""Families and configs of the golden table `mixes.json`."""


def make_case(folder: Path, case: Case) -> Checkpoint:
    """Write a case's model with counted weights and open it."""
    weights = _make(folder, case, {})
    counted = {name: _count(weights[name], 7 * i) for i, name in enumerate(sorted(weights))}
    save_file(counted, folder / "model.safetensors", metadata={"format": "pt"})
    return reopen(folder)


def draw_case(folder: Path, case: Case, **config: Any) -> Checkpoint:
    """Write a case's model with random weights in float32 and open it.

    Args:
        config: what the config says besides that of the case.
    """
    weights = _make(folder, case, config, dtype="float32")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return reopen(folder)


def _make(folder: Path, case: Case, extra: Mapping[str, Any], **model: Any) -> dict[str, Tensor]:
    """Write a case's config and return its random weights."""
    make_pico_model(folder, family=case.family, tokenizer=False, **{**case.model, **model})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config = {key: value for key, value in config.items() if key not in case.without}
    path.write_text(json.dumps({**config, **case.config, **extra}))
    weights = load_file(folder / "model.safetensors")
    for name in sorted(weights):
        for layer in case.biases:
            if name.endswith(f".{layer}.weight"):
                bias = weights[name][:, 0].contiguous()
                weights[name.replace(".weight", ".bias")] = bias
    return weights


def reopen(folder: Path) -> Checkpoint:
    """Open a model folder under the name `pico`."""
    return open_checkpoint(Source("pico", folder, None))


def describe_headers(family: str, **config: Any) -> Checkpoint:
    """Return a checkpoint of which there are only the config and the headers.

    Args:
        config: what differs from the config that transformers makes for the family.
    """
    parsed = AutoConfig.for_model(family, **config)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(parsed)
    names = model.state_dict()
    if parsed.tie_word_embeddings:
        names.pop("lm_head.weight")
    infos = {
        name: TensorInfo(name, "BF16", tuple(tensor.shape), Path("model.safetensors"), 0, 0)
        for name, tensor in names.items()
    }
    return Checkpoint(Source(family, Path(), None), parsed.to_dict(), infos, ())


def _count(tensor: Tensor, start: int) -> Tensor:
    """Fill a tensor with multiples of 1/32 that every dtype holds, neighbours all different."""
    numbers = torch.arange(start, start + tensor.numel()) * 37 % 251
    return ((numbers - 125) / 32).reshape(tensor.shape).to(tensor.dtype)
