"""What models cache for each token, against figures that are worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.capacity import find_gpu, kv_cache_bytes, read_shape
from quantkit.capacity.gpus import read_listing
from quantkit.errors import CheckpointError, InputError

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def test_grouped_heads() -> None:
    """2 x 80 layers x 8 heads x 128 = 163,840 numbers a token: 0.3125 MiB at 16 bit."""
    shape = read_shape(LLAMA_70B)
    assert shape.head_dim == 128
    assert shape.values_per_token == 163_840
    assert kv_cache_bytes(shape, 4096, 1, 2) == 4096 * 163_840 * 2
    assert kv_cache_bytes(shape, 4096, 3, 1) == 3 * 4096 * 163_840


def test_pages_are_whole() -> None:
    """One token takes a page of sixteen."""
    shape = read_shape(LLAMA_70B)
    assert kv_cache_bytes(shape, 1, 1, 2) == kv_cache_bytes(shape, 16, 1, 2)
    assert kv_cache_bytes(shape, 1, 1, 2, block=1) == 163_840 * 2


def test_windows_bound_what_is_kept() -> None:
    """Of four layers two keep no more than their window."""
    config = LLAMA_70B | {
        "num_hidden_layers": 4,
        "sliding_window": 1024,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    shape = read_shape(config)
    assert [layer.window for layer in shape.layers] == [1024, None, 1024, None]
    assert kv_cache_bytes(shape, 8192, 1, 2) == 2 * (1024 + 8192) * 2 * 8 * 128 * 2


def test_a_window_that_is_not_used() -> None:
    """Qwen's configs name one and have no layer with it; Mistral's first models have it."""
    qwen = read_shape(LLAMA_70B | {"model_type": "qwen2", "sliding_window": 4096})
    mistral = read_shape(LLAMA_70B | {"model_type": "mistral", "sliding_window": 4096})
    assert {layer.window for layer in qwen.layers} == {None}
    assert {layer.window for layer in mistral.layers} == {4096}


def test_latent_attention() -> None:
    """DeepSeek V3 keeps 512 + 64 numbers a token and layer, whatever its heads."""
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 61}
    shape = read_shape(LLAMA_70B | latent)
    assert shape.values_per_token == 61 * 576
    # Each of several GPUs holds them all; key/value heads are dealt out as far as they go.
    assert shape.cached_share(8) == 1
    assert [read_shape(LLAMA_70B).cached_share(count) for count in (1, 4, 16)] == [1, 1 / 4, 1 / 8]


def test_states_of_fixed_size_are_noted() -> None:
    """They do not grow with the context, and the estimate leaves them out."""
    kinds = ["linear_attention", "full_attention"] * 40
    shape = read_shape(LLAMA_70B | {"layer_types": kinds})
    assert shape.values_per_token == 163_840 // 2
    assert "40 of 80 layers" in shape.notes[0]


def test_a_text_model_within_a_larger_one() -> None:
    """Its sizes stand in text_config."""
    assert read_shape({"model_type": "gemma3", "text_config": LLAMA_70B}).kv_heads == 8


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "many", 1.5, True, 10**9])
def test_sizes_that_make_no_sense(key: str, value: object) -> None:
    """A config is somebody's file."""
    config = LLAMA_70B | {key: value}
    if value == 10**9 and key != "num_hidden_layers":
        return
    with pytest.raises(CheckpointError, match=r"num_hidden_layers|hidden_size|vocab_size|layers"):
        read_shape(config)


def test_gpus_of_the_table_and_of_the_machine() -> None:
    """Names are found in any case; lines of nvidia-smi that say nothing are left out."""
    assert find_gpu("h100").has_fp8
    assert not find_gpu("A100-80GB").has_fp8
    with pytest.raises(InputError, match="did you mean 'H100'"):
        find_gpu("H10")
    found = read_listing("NVIDIA H200, 143771, 9.0\n[Unknown Error], [N/A], [N/A]\n\nNVIDIA L4\n")
    assert [(gpu.name, gpu.memory_bytes >> 20) for gpu in found] == [("NVIDIA H200", 143_771)]
