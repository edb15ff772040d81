"""How fast the products that calibration and solving consist of are on this processor.

Second moments of bfloat16 activations: by quantkit, with float32 sums; by torch from activations
widened to float32, in each of its two libraries; and in bfloat16 with rounded sums, which bounds
them all. Then float32 products in both libraries. The ways take turns, on one batch of 1,024
tokens, and each counts only the operations of one half of a symmetric result. Errors are those
beside float64, relative to the norm.

usage: python benchmarks/products.py [--rounds N]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from measure import spread
from torch import Tensor
from turns import settle_as_the_command, take_turns, write_speeds

from quantkit.calibration.stats import PANEL
from quantkit.numerics.onednn import set_quick_float32, usual_float32
from quantkit.numerics.products import add_product, pack_rows, sums_products

TOKENS = 1024
FEATURES = (896, 2048, 4864, 8192)
OURS, WIDENED, ROUNDED = "quantkit", "widened to float32", "bfloat16, sums rounded"
FLOAT32 = "float32 product"


@dataclass(frozen=True)
class Speed:
    """One way to a product; `error` is None where it was not looked at."""

    features: int
    way: str
    library: str
    gflops: float
    low: float
    high: float
    error: float | None = None


def main() -> int:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    settle_as_the_command()
    if not sums_products(torch.device("cpu")):
        raise SystemExit("quantkit's own product takes AVX512-BF16 without AMX, and numba")
    if not set_quick_float32():
        raise SystemExit("on this processor torch's usual library is left to it")
    found = [speed for features in FEATURES for speed in measure_size(features, rounds)]
    write_speeds("products", {"tokens": TOKENS, "rounds": rounds}, found, render(found))
    return 0


def measure_size(features: int, rounds: int) -> list[Speed]:
    """Return the speeds of all ways to the products of one size."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TOKENS, features, generator=generator).bfloat16()
    widened, total = rows.float(), torch.zeros(features, features)
    room = torch.empty(TOKENS * (features + 48), dtype=torch.int32)
    square = torch.randn(features, features, generator=generator)
    expected = (rows.double().T @ rows.double()).triu()

    def ours() -> None:
        packed = pack_rows(rows, room)
        add_product(total, packed, packed, upper=True)

    def usual() -> None:
        with usual_float32():
            add_panels(total, widened.copy_(rows))

    def quick() -> None:
        add_panels(total, widened.copy_(rows))

    def rounded() -> None:
        for start in range(0, features, PANEL):
            total[start : start + PANEL, start:] += (
                rows[:, start : start + PANEL].T @ rows[:, start:]
            )

    def multiply_usually() -> Tensor:
        with usual_float32():
            return widened @ square

    def multiply_quickly() -> Tensor:
        return widened @ square

    sums = {(OURS, "quantkit"): ours, (WIDENED, "MKL"): usual, (WIDENED, "oneDNN"): quick}
    sums[ROUNDED, "oneDNN"] = rounded
    products = {(FLOAT32, "MKL"): multiply_usually, (FLOAT32, "oneDNN"): multiply_quickly}
    seconds = take_turns({**sums, **products}, rounds)
    found = []
    for (way, library), times in seconds.items():
        operations = TOKENS * features * (features + 1 if way != FLOAT32 else 2 * features)
        speed = spread([operations / each / 1e9 for each in times])
        error = None
        if way != FLOAT32:
            total.zero_()
            sums[way, library]()
            error = float((total.triu() - expected).norm() / expected.norm())
        found.append(
            Speed(features, way, library, speed["median"], speed["low"], speed["high"], error)
        )
    return found


def add_panels(total: Tensor, rows: Tensor) -> None:
    """Add the upper triangle of rows^T rows as torch does it, a panel at a time."""
    for start in range(0, len(total), PANEL):
        here = total[start : start + PANEL, start:]
        here.addmm_(rows[:, start : start + PANEL].T, rows[:, start:])


def render(speeds: list[Speed]) -> str:
    """Return the tables in Markdown."""
    lines = [
        "| features | product | library | GFLOP/s, median | lowest to highest | relative error |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for each in speeds:
        error = "" if each.error is None else f"{each.error:.1e}"
        lines.append(
            f"| {each.features} | {each.way} | {each.library} | {each.gflops:.0f} | "
            f"{each.low:.0f} to {each.high:.0f} | {error} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
