"""The scales of a block's key/value cache."""

from __future__ import annotations

import torch

from quantkit.blocks.draft import Draft
from quantkit.records import BlockPlan, KvCachePlan, KvStats
from quantkit.solvers import choose_kv_scales, collapse_heads, divide_values


def solve_kv_cache(
    block: BlockPlan, plan: KvCachePlan, stats: KvStats, draft: Draft, scale_dtype: torch.dtype
) -> None:
    """Choose the scales of the block's key/value cache and add them to `draft`.

    Args:
        block: all of its quantized groups are in `draft`.
        plan: names the attention layer.
        stats: of its keys and values, as the walk made them.
        draft: changed in place.
        scale_dtype: dtype of the scales in the artifact.
    """
    attention = next(name for name in plan.attentions if name.startswith(f"{block.prefix}."))
    for group in block.groups:
        fold = group.fold
        scale = draft.replay.get(f"fold:{group.linears[0].name}")
        if scale is not None and fold is not None and fold.module.startswith(f"{attention}."):
            stats = divide_values(stats, collapse_heads(scale, fold.repeat, fold.head_dim))
    added, draft.kv = choose_kv_scales(
        attention, stats, per_head=plan.per_head, scale_dtype=scale_dtype
    )
    draft.added |= added
