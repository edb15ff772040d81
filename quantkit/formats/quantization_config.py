"""The `quantization_config` that compressed-tensors readers look for in config.json.

Read by transformers (compressed-tensors 0.17 to 0.20) and vLLM 0.32. Both look for a layer's group
by its exact name first, then by regular expression, then by class name (`Linear`); vLLM also
resolves the layers that it fuses (`qkv_proj`, `gate_up_proj`) through the names of their parts. So
exact names and `Linear` mean the same to all of them, and no regular expressions are written.

Each group names its format, since readers would infer another one for 4-bit codes with rounded
activations; groups of different formats make the whole `mixed-precision`, as in compressed-tensors
(`compressors/format.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantkit.formats.config_groups import CLASS
from quantkit.formats.layouts import InputRounding, Layout, lay_out
from quantkit.records import KvCachePlan, LinearPlan

LAYOUT_VERSION = "0.20.0"
"""Version of compressed-tensors whose layout is written."""

MIXED = "mixed-precision"
DENSE = "dense"
"""Formats of a whole artifact: several formats, or no quantized layer."""


def build_quantization_config(
    linears: Iterable[LinearPlan], others: Iterable[str], kv_cache: KvCachePlan | None = None
) -> dict[str, Any] | None:
    """Describe the quantized layers, and the key/value cache, to a reader.

    Args:
        linears: the planned layers, in the order of the model.
        others: names of all linear modules of the model, planned or not; those that are not
            quantized are listed under `ignore`, since the target `Linear` would claim them.
        kv_cache: what scales the cache has.

    Returns:
        The value of config.json's `quantization_config`, or None where nothing is quantized.
    """
    members: dict[Layout, list[str]] = {}
    for linear in linears:
        if linear.quantized:
            layout = lay_out(linear.scheme, linear.group_size)
            members.setdefault(layout, []).append(linear.name)
    if not members and kv_cache is None:
        return None
    quantized = {name for names in members.values() for name in names}
    groups = {
        f"group_{position}": _describe_group(layout, [CLASS] if len(members) == 1 else names)
        for position, (layout, names) in enumerate(members.items())
    }
    return {
        "config_groups": groups,
        "format": _name_format(members),
        "global_compression_ratio": None,
        "ignore": sorted(set(others) - quantized),
        "kv_cache_scheme": None if kv_cache is None else _describe_cache(kv_cache),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": LAYOUT_VERSION,
    }


def _name_format(layouts: Iterable[Layout]) -> str:
    formats = {layout.format for layout in layouts}
    if not formats:
        return DENSE
    return formats.pop() if len(formats) == 1 else MIXED


def _describe_group(layout: Layout, targets: list[str]) -> dict[str, Any]:
    return {
        "format": layout.format,
        "input_activations": None if layout.inputs is None else _describe_inputs(layout.inputs),
        "output_activations": None,
        "targets": targets,
        "weights": {
            "actorder": None,
            "block_structure": None if layout.block is None else list(layout.block),
            "dynamic": False,
            "group_size": layout.group_size,
            "num_bits": layout.bits,
            "strategy": layout.strategy,
            "symmetric": layout.symmetric,
            "type": layout.kind,
        },
    }


def _describe_inputs(inputs: InputRounding) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": inputs.dynamic,
        "group_size": inputs.group_size,
        "num_bits": inputs.bits,
        "strategy": inputs.strategy,
        "symmetric": inputs.symmetric,
        "type": inputs.kind,
    }


def _describe_cache(kv_cache: KvCachePlan) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "strategy": "attn_head" if kv_cache.per_head else "tensor",
        "symmetric": True,
        "type": "float",
    }
