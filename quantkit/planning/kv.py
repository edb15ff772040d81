"""The key/value cache of a plan: which attention layers get scales, and who can serve them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from quantkit.checkpoint.structure import Structure
from quantkit.recipe import Recipe
from quantkit.records import KvCachePlan

_CPU_MULTIPLE = 32
"""What head_dim must be a multiple of in vLLM's attention kernels for CPUs with an FP8 cache."""


def plan_kv_cache(
    recipe: Recipe, skeleton: nn.Module, structure: Structure
) -> tuple[KvCachePlan | None, tuple[str, ...]]:
    """Find the attention layers whose cache the recipe wants quantized.

    Returns:
        The plan, or None where the recipe wants none; and what stands in its way: attention layers
        that are not known, or whose heads are not.
    """
    wanted = recipe.quantize.kv_cache
    if wanted == "none":
        return None, ()
    model = type(skeleton).__name__
    attentions = tuple(block.attention for block in structure.blocks if block.attention is not None)
    if len(attentions) < len(structure.blocks):
        return None, (
            f"kv_cache {wanted}: no family file says where the attention of {model} is, so its "
            f"keys and values cannot be observed; use kv_cache none",
        )
    kv_heads = getattr(cast(Any, skeleton).config.get_text_config(), "num_key_value_heads", None)
    dims = {getattr(skeleton.get_submodule(name), "head_dim", None) for name in attentions}
    head_dim = dims.pop() if len(dims) == 1 else None
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        return None, (
            f"kv_cache {wanted}: the heads that {model} caches are not known (num_key_value_heads "
            f"{kv_heads}, head_dim {head_dim}); use kv_cache none",
        )
    return KvCachePlan(wanted == "fp8_per_head", attentions, kv_heads, head_dim), ()


def scale_bytes(plan: KvCachePlan | None, scale_dtype: str) -> int:
    """Return the bytes of the scales in the artifact."""
    if plan is None:
        return 0
    scales = 2 * len(plan.attentions) * (plan.kv_heads if plan.per_head else 1)
    dtype: torch.dtype = getattr(torch, scale_dtype)
    return scales * dtype.itemsize


def note_kv_runtimes(plan: KvCachePlan | None) -> Iterator[str]:
    """Say which runtimes can serve the cache, as vLLM 0.32's attention backends have it."""
    if plan is None:
        return
    if plan.per_head:
        yield (
            "FP8 KV cache with scales per head: vLLM has it with FlashAttention 3 or later (Hopper "
            "and data-centre Blackwell GPUs) and refuses it with its other GPU backends; its CPU "
            "build takes the largest scale for all heads"
        )
    else:
        yield (
            "FP8 KV cache: vLLM needs a GPU of compute capability 8.9 or later, or a CPU with "
            "AVX-512 or AMX; on a CPU it cuts values off instead of rounding them"
        )
    if plan.head_dim % _CPU_MULTIPLE:
        yield (
            f"FP8 KV cache: vLLM's CPU build needs a head_dim that {_CPU_MULTIPLE} divides, and it "
            f"is {plan.head_dim}"
        )
