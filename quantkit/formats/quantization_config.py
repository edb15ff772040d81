"""The `quantization_config` that compressed-tensors readers look for in config.json.

Read by transformers (compressed-tensors 0.17 to 0.20) and vLLM 0.32. Both look for a layer's group
by its exact name first, then by regular expression, then by class name (`Linear`); vLLM also
resolves the layers that it fuses (`qkv_proj`, `gate_up_proj`) through the names of their parts. So
exact names and `Linear` mean the same to all of them, and no regular expressions are written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantkit.records import LinearPlan

LAYOUT_VERSION = "0.20.0"
"""Version of compressed-tensors whose layout is written."""

PACKED = "pack-quantized"


def build_quantization_config(
    linears: Iterable[LinearPlan], others: Iterable[str]
) -> dict[str, Any] | None:
    """Describe the quantized layers to a reader.

    Args:
        linears: the planned layers, in the order of the model.
        others: names of all linear modules of the model, planned or not; those that are not
            quantized are listed under `ignore`, since the target `Linear` would claim them.

    Returns:
        The value of config.json's `quantization_config`, or None where nothing is quantized.
    """
    members: dict[tuple[str, int | None], list[LinearPlan]] = {}
    for linear in linears:
        if linear.quantized:
            members.setdefault((linear.scheme.name, linear.group_size), []).append(linear)
    if not members:
        return None
    quantized = {linear.name for group in members.values() for linear in group}
    groups = {}
    for position, group in enumerate(members.values()):
        names = ["Linear"] if len(members) == 1 else [linear.name for linear in group]
        groups[f"group_{position}"] = _describe_group(group[0], names)
    return {
        "config_groups": groups,
        "format": PACKED,
        "global_compression_ratio": None,
        "ignore": sorted(set(others) - quantized),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": LAYOUT_VERSION,
    }


def _describe_group(linear: LinearPlan, targets: list[str]) -> dict[str, Any]:
    return {
        "format": PACKED,
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "group_size": linear.group_size,
            "num_bits": linear.scheme.weight_bits,
            "strategy": "channel" if linear.group_size is None else "group",
            "symmetric": linear.scheme.symmetric,
            "type": "int",
        },
    }
