"""How fast the joint search for scales is on this processor, by compiled loops and by torch.

Random weights in groups of 128 under the second moment of random inputs, two sweeps, as AWQ rounds
at its usual effort: whole searches, in turns. Losses are sums over the rows, relative to those of
torch's search.

usage: python benchmarks/joint_search.py [--rounds N]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from measure import spread
from turns import settle_as_the_command, take_turns, write_speeds

from quantkit.numerics.joint_cheapest import chooses_jointly
from quantkit.numerics.joint_search import JointSearch, search_scales_jointly
from quantkit.numerics.onednn import quick_float32
from quantkit.schemes import SCHEMES

SHAPES = ((1152, 896), (9728, 896), (896, 4864))
"""Rows and columns: q, k and v of Qwen2-0.5B, its gate and up, and down."""
NAMES = ("w4a16", "w4a16_asym", "w8a16")
GROUP_SIZE, SWEEPS = 128, 2
OURS, TORCH = "compiled loops", "torch"


@dataclass(frozen=True)
class Speed:
    """One way through one search: seconds, and the loss relative to torch's."""

    rows: int
    columns: int
    scheme: str
    way: str
    seconds: float
    low: float
    high: float
    relative_loss: float


@quick_float32()
def main() -> int:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    settle_as_the_command()
    found = [
        speed
        for rows, columns in SHAPES
        for name in NAMES
        for speed in measure_search(rows, columns, name, rounds)
    ]
    write_speeds("joint_search", {"rounds": rounds, "sweeps": SWEEPS}, found, render(found))
    return 0


def measure_search(rows: int, columns: int, name: str, rounds: int) -> list[Speed]:
    """Return the speeds of both ways."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(2048, columns, generator=generator)
    moment = inputs.T @ inputs / len(inputs)
    if not chooses_jointly(weight, SCHEMES[name], GROUP_SIZE):
        raise SystemExit("the loops take numba: pip install 'quantkit[fast]'")

    def search(by_loops: bool) -> JointSearch:
        with patch(f"{search_scales_jointly.__module__}.chooses_jointly", lambda *_: by_loops):
            return search_scales_jointly(
                weight, SCHEMES[name], GROUP_SIZE, torch.bfloat16, moment, SWEEPS
            )

    ways = {OURS: partial(search, True), TORCH: partial(search, False)}
    seconds = take_turns(ways, rounds)
    expected = float(search(False).losses.sum())
    found = []
    for way, run in ways.items():
        speed = spread(seconds[way])
        loss = float(run().losses.sum()) / expected
        found.append(
            Speed(rows, columns, name, way, speed["median"], speed["low"], speed["high"], loss)
        )
    return found


def render(speeds: list[Speed]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| rows | columns | scheme | by | seconds, median | lowest to highest | relative loss |",
        "|---:|---:|---|---|---:|---:|---:|",
    ]
    for each in speeds:
        lines.append(
            f"| {each.rows} | {each.columns} | {each.scheme} | {each.way} | {each.seconds:.3f} "
            f"| {each.low:.3f} to {each.high:.3f} | {each.relative_loss:.6f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
