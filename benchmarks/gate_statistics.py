"""Simulate the gate's rule: how often is it wrong at a limit, and what does being right take?

Windows are drawn from those of the demo model and from skewed made-up ones, whose true mean is
known, and put at a limit, at half of it and at 0.8 of it. Intervals, looks and their confidence are
the product's own functions; only the comparison with the limit is written here for many
repetitions at once.

usage: python benchmarks/gate_statistics.py [--repetitions 20000] [--measure]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from measure import RESULTS, ROOT, describe_commit, package_versions, write_results

import quantkit
from quantkit.calibration.data import load_tokenizer, load_windows
from quantkit.judging.evaluate import evaluate
from quantkit.judging.sampling import find_look_confidence, plan_looks
from quantkit.judging.statistics import mean_intervals
from quantkit.recipe import MIN_WINDOWS

CONFIDENCE = 0.95
SAMPLES = (8, 16, 32, 64, 128)
MORE = 4
"""Windows at the most, in multiples of those of the first look, as the recipe's default has it."""
RATIOS = (1.0, 0.5, 0.8)
"""True mean over limit."""
MEASURED = RESULTS / "gate_windows.json"
CHUNK = 4000
"""Repetitions at a time."""

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
Shares = Callable[[Sequence[int]], list[float]]


@dataclass(frozen=True)
class Outcome:
    """Of many repetitions of the whole rule, with the true mean at some ratio to the limit."""

    passed: float
    failed: float
    windows: float
    """Measured on average."""


@dataclass(frozen=True)
class Row:
    """One distribution and number of windows."""

    windows: str
    samples: int
    looks: tuple[int, ...]
    one_look: Outcome
    """At the limit, when there are no more windows than `samples`."""
    at_limit: Outcome
    at_half: Outcome
    at_most: Outcome
    """At 0.8 of the limit."""


@dataclass(frozen=True)
class Order:
    """The demo's own text at the limit, read from some place on or at random."""

    windows: str
    samples: int
    in_order: Outcome
    at_random: Outcome


def main() -> None:
    """Simulate, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20_000)
    parser.add_argument("--measure", action="store_true", help="measure the demo's windows anew")
    arguments = parser.parse_args()
    if arguments.measure:
        measure_windows()
    draws = find_draws()
    rows = [
        simulate_row(name, draw, samples, arguments.repetitions)
        for name, draw in draws.items()
        for samples in SAMPLES
    ]
    shares = [
        (name, samples, *compare_shares(draws[name], samples, arguments.repetitions))
        for name in ("KL of the demo", "log-normal, sigma 1")
        for samples in (32, 128)
    ]
    orders = [
        compare_orders(name, values, samples, arguments.repetitions)
        for name, values in read_windows().items()
        for samples in (16, 32, 64)
    ]
    document = {
        "confidence": CONFIDENCE,
        "repetitions": arguments.repetitions,
        "commit": describe_commit(),
        "packages": package_versions(("quantkit", "numpy")),
        "rows": [asdict(row) for row in rows],
        "shares": [
            {"windows": name, "samples": samples, "even": asdict(even), "late": asdict(late)}
            for name, samples, even, late in shares
        ],
        "orders": [asdict(order) for order in orders],
    }
    write_results("gate_statistics", document, render(rows, shares, orders, arguments.repetitions))


def measure_windows() -> None:
    """Quantize the demo model by its recipe, measure all of its evaluation text, store that."""
    model = ROOT / "models" / "demo-llama"
    text = ROOT / "calib_data" / "docs_evaluation.txt"
    windows = load_windows(
        text,
        split="test",
        text_column="text",
        tokenizer=load_tokenizer(model),
        samples=MIN_WINDOWS,
        sequence_length=512,
        seed=0,
        order="sequential",
        at_most=1 << 20,
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "demo")
        paths = (f"calibration.data={ROOT / 'calib_data' / 'docs_calibration.txt'}",)
        quantkit.quantize("demo", model=model, output=output, overrides=paths, gate=False)
        result = evaluate(model, output / "compressed-tensors", windows, device="cpu")
    found = {
        name: [round(value, 9) for value in getattr(result, name)]
        for name in ("baseline_nll", "candidate_nll", "kl", "agreement")
    }
    rest = {"tokens": result.tokens, "kl_p99": result.kl_p99, "kl_max": result.kl_max}
    about = {"model": model.name, "recipe": "demo", "text": text.name, "sequence_length": 512}
    MEASURED.parent.mkdir(parents=True, exist_ok=True)
    MEASURED.write_text(json.dumps({**about, **rest, **found}) + "\n", encoding="utf-8")


def read_windows() -> dict[str, np.ndarray]:
    """Return the demo's measured windows in the order of the text, with a mean of 1."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    kl, base, candidate, agreement = (
        np.array(found[name]) for name in ("kl", "baseline_nll", "candidate_nll", "agreement")
    )
    named = {
        "KL of the demo": kl,
        "nll difference of the demo": candidate - base,
        "disagreement of the demo": 1 - agreement,
    }
    return {name: values / values.mean() for name, values in named.items()}


def find_draws() -> dict[str, Draw]:
    """Return name -> what draws windows with a true mean of 1."""

    def resample(values: np.ndarray) -> Draw:
        return lambda rng, shape: values[rng.integers(0, len(values), shape)]

    return {
        **{name: resample(values) for name, values in read_windows().items()},
        "log-normal, sigma 0.5": lambda rng, shape: rng.lognormal(-0.125, 0.5, shape),
        "log-normal, sigma 1": lambda rng, shape: rng.lognormal(-0.5, 1, shape),
        "log-normal, sigma 1.5": lambda rng, shape: rng.lognormal(-1.125, 1.5, shape),
        "Pareto, index 3": lambda rng, shape: (rng.pareto(3, shape) + 1) / 1.5,
    }


def share_evenly(looks: Sequence[int]) -> list[float]:
    """The product's rule."""
    return [find_look_confidence(CONFIDENCE, len(looks))] * len(looks)


def share_late(looks: Sequence[int]) -> list[float]:
    """Most of the error for the last look (O'Brien and Fleming's shape, Lan and DeMets 1983)."""
    normal = NormalDist()
    quantile = normal.inv_cdf((1 + CONFIDENCE) / 2)
    spent = [2 * normal.cdf(-quantile / (look / looks[-1]) ** 0.5) for look in looks]
    return [1 - (now - before) for now, before in zip(spent, [0.0, *spent], strict=False)]


def simulate_row(name: str, draw: Draw, samples: int, repetitions: int) -> Row:
    """Run the rule on one kind of windows."""
    looks = plan_looks(samples, MORE * samples)
    one, *_ = run_rule(draw, plan_looks(samples, samples), share_evenly, repetitions)
    limit, half, most = run_rule(draw, looks, share_evenly, repetitions)
    return Row(name, samples, looks, one, limit, half, most)


def compare_shares(draw: Draw, samples: int, repetitions: int) -> tuple[Outcome, Outcome]:
    """Return what even and late shares of the error give at 0.8 of the limit."""
    looks = plan_looks(samples, MORE * samples)
    even, late = (run_rule(draw, looks, by, repetitions)[2] for by in (share_evenly, share_late))
    return even, late


def compare_orders(name: str, values: np.ndarray, samples: int, repetitions: int) -> Order:
    """Run the rule on the demo's own text, whose mean is the limit.

    In the order of the text it may begin at any window, and goes on at the beginning after the end.
    """
    count = len(values)

    def stretches(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        starts = rng.integers(0, count, shape[1])
        return values[(starts + np.arange(shape[0])[:, None]) % count]

    def shuffled(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        rows = rng.permuted(np.tile(np.arange(count), (shape[1], 1)), axis=1)
        return values[rows[:, : shape[0]].T]

    looks = plan_looks(samples, min(MORE * samples, count))
    in_order, at_random = (
        run_rule(draw, looks, share_evenly, repetitions)[0] for draw in (stretches, shuffled)
    )
    return Order(name, samples, in_order, at_random)


def run_rule(
    draw: Draw, looks: Sequence[int], shares: Shares, repetitions: int
) -> tuple[Outcome, ...]:
    """Return an outcome for each of `RATIOS`, from the same draws."""
    rng = np.random.default_rng(0)
    confidences = shares(looks)
    tallies = np.zeros((len(RATIOS), 3))
    for start in range(0, repetitions, CHUNK):
        count = min(CHUNK, repetitions - start)
        values = draw(rng, (looks[-1], count))
        bounds = [
            mean_intervals(values[:look], confidence)
            for look, confidence in zip(looks, confidences, strict=True)
        ]
        for index, ratio in enumerate(RATIOS):
            tallies[index] += _decide(bounds, looks, 1 / ratio)
    return tuple(Outcome(*(float(value) for value in row / repetitions)) for row in tallies)


def _decide(
    bounds: Sequence[np.ndarray], looks: Sequence[int], limit: float
) -> tuple[int, int, int]:
    """Return how many pass, how many fail, and how many windows all of them take.

    Args:
        bounds: of each look [repetitions, 2].
        looks: windows of each.
        limit: the highest mean that is right.
    """
    is_open = np.ones(len(bounds[0]), dtype=bool)
    passed = failed = windows = before = 0
    for (low, high), look in zip((each.T for each in bounds), looks, strict=True):
        windows += int(is_open.sum()) * (look - before)
        before = look
        within, outside = is_open & (high <= limit), is_open & (low > limit)
        passed += int(within.sum())
        failed += int(outside.sum())
        is_open &= ~(within | outside)
    return passed, failed, windows


def render(
    rows: Sequence[Row],
    shares: Sequence[tuple[str, int, Outcome, Outcome]],
    orders: Sequence[Order],
    repetitions: int,
) -> str:
    """Write the tables."""
    error = 1 - CONFIDENCE
    worst = max(max(row.at_limit.passed, row.one_look.passed) for row in rows)
    noise = 100 * (error * (1 - error) / repetitions) ** 0.5
    lines = [
        f"The gate's rule at a confidence of {CONFIDENCE}, {repetitions} repetitions a row "
        f"(a standard error of {noise:.2f} points at {100 * error:.0f} %). "
        "`one look` has no more windows than the first look; the other columns may go on to "
        f"{MORE} times as many. An artifact exactly at its limit may pass in "
        f"{100 * error:.0f} % of cases; the most in any row is {100 * worst:.1f} %.",
        "",
        "| windows | first look | false PASS, one look | false PASS | false FAIL | PASS at half "
        "the limit | PASS at 0.8 | windows at half | windows at 0.8 | windows at the limit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        limit, half, most = row.at_limit, row.at_half, row.at_most
        lines.append(
            f"| {row.windows} | {row.samples} | {_percent(row.one_look.passed)} "
            f"| {_percent(limit.passed)} | {_percent(limit.failed)} "
            f"| {_percent(half.passed)} | {_percent(most.passed)} "
            f"| {half.windows:.0f} | {most.windows:.0f} | {limit.windows:.0f} |"
        )
    lines += [
        "",
        "The error shared evenly among the looks, as the gate does it, or mostly kept for the last "
        "look, at 0.8 of the limit:",
        "",
        "| windows | first look | PASS, even | windows, even | PASS, late | windows, late |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, samples, even, late in shares:
        lines.append(
            f"| {name} | {samples} | {_percent(even.passed)} | {even.windows:.0f} "
            f"| {_percent(late.passed)} | {late.windows:.0f} |"
        )
    lines += [
        "",
        "The demo's text as it is, its own mean the limit: windows in the order of the text, from "
        "some place on, or in a random order, as the gate takes them:",
        "",
        "| windows | first look | false PASS, in order | false FAIL, in order "
        "| false PASS, random | false FAIL, random |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for order in orders:
        found = (order.in_order, order.at_random)
        cells = [_percent(share) for each in found for share in (each.passed, each.failed)]
        lines.append(f"| {order.windows} | {order.samples} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
