"""The scales of a quantized key/value cache: their names, shapes and dtypes.

Per attention layer two tensors, `<attention>.k_scale` and `<attention>.v_scale`:

    [1]               strategy `tensor`: one scale for all heads
    [kv_heads, 1, 1]  strategy `attn_head`

in the dtype of the other scales: transformers casts them to the model's dtype, vLLM to float32, so
both use the stored numbers. A cached value x is float8_e4m3fn(clamp(x / scale, -448, 448)) * scale;
keys are taken after the rotary embedding. Sources: compressed-tensors 0.17
(`quantization/lifecycle/initialize.py`, `modeling/kvcache.py`) and vLLM 0.32
(`compressed_tensors.py`, CompressedTensorsKVCacheMethod, which fills in 1.0 where a scale is
missing, and flattens those of heads).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.shards import TensorSpec
from quantkit.records import KvCachePlan

K_SCALE, V_SCALE = KV_SCALES = ("k_scale", "v_scale")
"""Last parts of the names."""


def specify_scales(
    kv_cache: KvCachePlan | None, prefix: str, scale_dtype: str
) -> tuple[TensorSpec, ...]:
    """Announce the scales of the attention layers whose names begin with `prefix`.

    `scale_dtype` is safetensors' name of a dtype.
    """
    if kv_cache is None:
        return ()
    shape = scale_shape(kv_cache.kv_heads if kv_cache.per_head else None)
    inside = [name for name in kv_cache.attentions if name.startswith(prefix)]
    return tuple(TensorSpec(name, scale_dtype, shape) for name in name_scales(inside))


def scale_shape(heads: int | None) -> tuple[int, ...]:
    """Return the shape of a layer's scale; None: one for all heads."""
    return (1,) if heads is None else (heads, 1, 1)


def name_scales(attentions: Iterable[str]) -> list[str]:
    """Return the names of the scales of attention layers."""
    return [f"{name}.{part}" for name in attentions for part in KV_SCALES]


def find_cache_scheme(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `kv_cache_scheme` that a config describes; None where it has none."""
    description = config.get("quantization_config")
    scheme = description.get("kv_cache_scheme") if isinstance(description, dict) else None
    return scheme if isinstance(scheme, dict) and scheme else None


def name_cache(config: Mapping[str, Any]) -> str:
    """Return quantkit's name of the cache that a config describes, or a description of it."""
    scheme = find_cache_scheme(config)
    if scheme is None:
        return "none"
    kind, bits, strategy = (scheme.get(key) for key in ("type", "num_bits", "strategy"))
    plain = scheme.get("symmetric", True) is True and scheme.get("dynamic", False) is False
    if (kind, bits) == ("float", 8) and plain and str(strategy) in _STRATEGIES:
        return _STRATEGIES[str(strategy)]
    return f"{kind}, {bits} bits, {strategy}"


def find_cache_problems(artifact: Checkpoint) -> list[str]:
    """Compare the cache that config.json describes with the names and shapes that are stored."""
    scheme, name = find_cache_scheme(artifact.config), name_cache(artifact.config)
    stored = {
        tensor: info.shape
        for tensor, info in artifact.tensors.items()
        if tensor.rpartition(".")[2] in KV_SCALES
    }
    if scheme is None:
        if not stored:
            return []
        return [
            f"{len(stored)} scales of a key/value cache are stored, for instance {min(stored)}, "
            f"but config.json has no kv_cache_scheme: servers leave the cache in 16 bits"
        ]
    problems = []
    if name not in _STRATEGIES.values():
        problems.append(f"config.json describes a key/value cache that vLLM refuses: {name}")
    attentions = find_attentions(artifact)
    missing = [tensor for tensor in name_scales(attentions) if tensor not in stored]
    if missing or not attentions:
        first = f", for instance {missing[0]}" if missing else ""
        problems.append(
            f"config.json describes a quantized KV cache, but {len(missing) or 'all'} of its "
            f"scales are missing{first}: servers take 1.0 for them without a word"
        )
    heads = count_heads(artifact.config) if name == _STRATEGIES["attn_head"] else None
    expected = scale_shape(heads)
    for tensor, shape in sorted(stored.items()):
        if (shape or (1,)) != expected:
            problems.append(f"tensor {tensor} has the shape {list(shape)}, not {list(expected)}")
    return problems


def find_attentions(artifact: Checkpoint) -> list[str]:
    """Return the full names of the modules that have a k_proj and a v_proj, or a scale."""
    parts = ("k_proj", "v_proj", "qkv_proj")
    found = {
        tensor.rpartition(f".{part}.")[0]
        for tensor in artifact.tensors
        for part in parts
        if f".{part}." in tensor
    }
    found |= {
        tensor.rpartition(".")[0]
        for tensor in artifact.tensors
        if tensor.rpartition(".")[2] in KV_SCALES
    }
    return sorted(found)


def count_heads(config: Mapping[str, Any]) -> int:
    """Return the key/value heads that a config describes; 0 where it does not say."""
    part = config.get("text_config")
    for place in (config, part if isinstance(part, dict) else {}):
        for key in ("num_key_value_heads", "num_attention_heads"):
            if type(place.get(key)) is int:
                return int(place[key])
    return 0


_STRATEGIES = {"tensor": "fp8", "attn_head": "fp8_per_head"}
