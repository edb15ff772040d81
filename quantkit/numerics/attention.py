"""Causal attention of bfloat16 queries, keys and values, on a processor.

torch's kernel for processors multiplies tiles that it converts and copies first, at a tenth of the
speed of products. Where the processor has AVX512-BF16 numba compiles one that does not, if it is
installed (`products.sums_products`). As in torch's, scores, maxima and sums are float32 and weights
are rounded to bfloat16 for their product with the values.

Shapes: B texts of T tokens, H heads of queries and fewer, in equal groups, of keys and values, D
channels of a head.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from quantkit.numerics.memory import view_numbers
from quantkit.numerics.threads import share_out

_CHANNELS = 16
"""D has to be a multiple of so many."""

_PRODUCTS_A_THREAD = 1 << 25
"""So few take about as long as starting a thread."""


def can_attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    """Say whether `attend_causally` takes these, where bfloat16 rows can be packed."""
    batch, heads, tokens, channels = query.shape
    shared = key.shape[1]
    return (
        all(part.dtype == torch.bfloat16 and part.is_cpu for part in (query, key, value))
        and key.shape == value.shape == (batch, shared, tokens, channels)
        and heads % shared == 0
        and channels % _CHANNELS == 0
        and query.numel() > 0
        and 0 < scaling < math.inf
    )


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Let every token attend to itself and those before it.

    A value that is not finite makes what comes out of it so too. It may do so for some tokens in
    front of it as well.

    Args:
        query: bfloat16 [B, H, T, D].
        key: bfloat16 [B, K, T, D], H a multiple of K.
        value: the same.
        scaling: the factor of the products of queries and keys, above 0.

    Returns:
        bfloat16 [B, T, H, D]; the number of threads changes no bit of it.

    Raises:
        ValueError: `can_attend` refuses them.
    """
    from quantkit.numerics.attention_compiled import QUERIES, attend, make_room

    if not can_attend(query, key, value, scaling):
        raise ValueError(
            f"attention does not take queries {query.dtype} {list(query.shape)}, keys {key.dtype} "
            f"{list(key.shape)} and values {value.dtype} {list(value.shape)}, scaled by {scaling}"
        )
    # In a model the heads of a token lie side by side, so that nothing is copied here.
    parts = [part.transpose(1, 2).contiguous() for part in (query, key, value)]
    output = torch.empty_like(parts[0])
    queries, keys, result = (view_numbers(part, np.int32) for part in (*parts[:2], output))
    values = view_numbers(parts[2], np.int16)
    scale = np.float32(scaling * math.log2(math.e))
    batch, tokens, heads, channels = output.shape

    def run(start: int, stop: int) -> None:
        room = make_room(tokens, channels)
        attend(room, queries, keys, values, scale, result, start, stop)

    units = batch * heads * -(-tokens // QUERIES)
    share_out(run, units, output.numel() * tokens // _PRODUCTS_A_THREAD)
    return output
