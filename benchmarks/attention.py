"""How fast the attention of calibration forwards is on this processor, beside torch's.

Causal attention of bfloat16 queries, keys and values whose heads lie side by side, as a model hands
them over: by quantkit's kernel and by torch's scaled dot product attention, in turns. Counted are
the operations of the causal half. Errors are those beside float64, relative to the norm.

usage: python benchmarks/attention.py [--rounds N]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from measure import spread
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from turns import settle_as_the_command, take_turns, write_speeds

from quantkit.numerics.attention import attend_causally
from quantkit.numerics.products import sums_products

SHAPES = ((4, 2, 64), (14, 2, 64), (32, 8, 128))
"""Heads of queries, heads of keys and values, and channels of a head: as the bundled model,
Qwen2-0.5B and Llama-3.1-8B have them."""
TOKENS = {512: 2, 2048: 1}
"""Tokens of a window and windows at a time."""
OURS, TORCH = "quantkit", "torch"


@dataclass(frozen=True)
class Speed:
    """One way through one shape: GFLOP/s with the lowest and the highest, and the error."""

    heads: int
    shared_heads: int
    channels: int
    tokens: int
    way: str
    gflops: float
    low: float
    high: float
    error: float


def main() -> int:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    settle_as_the_command()
    if not sums_products(torch.device("cpu")):
        raise SystemExit("quantkit's own attention takes AVX512-BF16 without AMX, and numba")
    found = [
        speed
        for shape in SHAPES
        for tokens, windows in TOKENS.items()
        for speed in measure_shape(shape, tokens, windows, rounds)
    ]
    write_speeds("attention", {"windows": TOKENS, "rounds": rounds}, found, render(found))
    return 0


def measure_shape(
    shape: tuple[int, int, int], tokens: int, windows: int, rounds: int
) -> list[Speed]:
    """Return the speeds of both ways."""
    heads, shared, channels = shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(windows, tokens, count, channels, generator=generator)
        .bfloat16()
        .transpose(1, 2)
        for count in (heads, shared, shared)
    )

    def by_torch() -> Tensor:
        return attend_by_torch(query, key, value)

    def by_us() -> Tensor:
        return attend_causally(query, key, value, channels**-0.5)

    exact = attend_by_torch(query.double(), key.double(), value.double())
    ways = {OURS: by_us, TORCH: by_torch}
    seconds = take_turns(ways, rounds)
    operations = 2 * windows * heads * channels * tokens * (tokens + 1)
    found = []
    for way, attend in ways.items():
        speed = spread([operations / each / 1e9 for each in seconds[way]])
        error = float((attend().double() - exact).norm() / exact.norm())
        found.append(
            Speed(*shape, tokens, way, speed["median"], speed["low"], speed["high"], error)
        )
    return found


def attend_by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what torch gives, [B, T, H, D]."""
    attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attended.transpose(1, 2)


def render(speeds: list[Speed]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| heads | of keys | channels | tokens | by | GFLOP/s, median | lowest to highest "
        "| relative error |",
        "|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for each in speeds:
        lines.append(
            f"| {each.heads} | {each.shared_heads} | {each.channels} | {each.tokens} | {each.way} "
            f"| {each.gflops:.0f} | {each.low:.0f} to {each.high:.0f} | {each.error:.2e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
