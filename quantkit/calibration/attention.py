"""What computes the attention of forwards that only have to come out right, not back.

Where a processor has a quicker kernel (numerics/attention.py) it takes what is causal attention and
nothing else; all that is more goes to transformers' scaled dot product attention, as it would
have. A model comes here by a function that is registered under a name, as transformers lets one be
(`AttentionInterface`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantkit.numerics.attention import attend_causally, can_attend
from quantkit.numerics.products import sums_products

Attend = Callable[..., tuple[Tensor, None]]
"""Takes an attention module, its queries, keys and values, all [B, heads, T, head_dim], a mask and
options; returns [B, T, heads, head_dim]."""

_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache"})
_LOOKED_AT = frozenset({"dropout", "scaling", "is_causal", "sliding_window"})


def choose_attention(device: torch.device, dtype: torch.dtype) -> Attend:
    """Return what forwards on a device use instead of scaled dot product attention, or just that.

    Args:
        dtype: what they compute in.
    """
    if dtype == torch.bfloat16 and sums_products(device):
        return _attend
    return cast(Attend, sdpa_attention_forward)


@contextmanager
def replaced_attention(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Let a function compute a model's scaled dot product attention; undo it afterwards.

    Other attention, which the function could not stand for, stays as it is.
    """
    transformers_model = cast(Any, model)
    usual = transformers_model.config._attn_implementation
    if attend is sdpa_attention_forward or usual != "sdpa":
        yield
        return
    # A name of its own: another model may be in the middle of a forward.
    name = f"quantkit_sdpa_{id(model)}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        # Of the model itself: what it may have for images keeps its own.
        transformers_model.set_attn_implementation({"": name})
        yield
    finally:
        transformers_model.set_attn_implementation({"": usual})
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    given = options.get("scaling")
    scaling: float = query.shape[3] ** -0.5 if given is None else given
    if (
        attention_mask is None
        and not torch.is_grad_enabled()
        and _is_causal(module, query.shape[2], options)
        and can_attend(query, key, value, scaling)
    ):
        return attend_causally(query, key, value, scaling), None
    return cast(
        tuple[Tensor, None],
        sdpa_attention_forward(module, query, key, value, attention_mask, **options),
    )


def _is_causal(module: nn.Module, tokens: int, options: Mapping[str, Any]) -> bool:
    """Say whether options mean causal attention without anything else."""
    causal = options.get("is_causal")
    window = options.get("sliding_window")
    others = options.keys() - _LOOKED_AT - _WITHOUT_EFFECT
    return (
        # One token alone is no prompt: transformers lets it see all keys.
        tokens > 1
        and bool(getattr(module, "is_causal", True) if causal is None else causal)
        and not options.get("dropout")
        and (window is None or tokens <= window)
        and all(options[name] is None or options[name] is False for name in others)
    )
