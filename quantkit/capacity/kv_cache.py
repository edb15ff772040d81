"""The size of the key/value cache."""

from __future__ import annotations

from quantkit.capacity.shapes import ModelShape

BLOCK_TOKENS = 16
"""Tokens of a page of vLLM's cache, which rounds every sequence up to whole pages."""


def kv_cache_bytes(
    shape: ModelShape,
    context: int,
    sequences: int,
    bytes_per_value: float,
    block: int = BLOCK_TOKENS,
) -> int:
    """Return the bytes of the keys and values of sequences that are all as long as the context.

    Args:
        context: tokens of each sequence, prompt and answer together.
        sequences: how many are served at once.
        bytes_per_value: 2 at 16 bit, 1 in FP8.
        block: tokens that are given memory together.
    """
    values = 0
    for layer in shape.layers:
        kept = context if layer.window is None else min(context, layer.window)
        values += -(-kept // block) * block * layer.values_per_token
    return round(values * sequences * bytes_per_value)
