"""Geometry of the picture of KL by position: one line with its band for each artifact.

Everything here is numbers and plain text; the template draws and escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.records import ArtifactReport, PositionRange, Report
from quantkit.report.axes import Tick, round_values
from quantkit.report.details import range_label
from quantkit.report.layers import is_positive
from quantkit.report.rounding import format_significant

WIDTH, HEIGHT = 660, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 640, 26, 256
MOST_LINES = 6
"""More lines are not told apart by colour and dashes; the table has all."""
_PAD = 0.06
_LEAST_DECADES = 0.5
"""A shorter axis would blow up differences that mean nothing."""

_Scale = Callable[[float], float]


@dataclass(frozen=True)
class Spot:
    """The mean KL of one range of positions."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class PositionLine:
    """One artifact: its line, the band of its intervals, and its points. number: from 1."""

    number: int
    name: str
    line: str
    band: str
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class PositionPlot:
    """Lines on two logarithmic axes: tokens read to the right, KL upwards."""

    lines: tuple[PositionLine, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left_out: int
    """Artifacts that have positions and no line."""
    sentence: str
    """What the picture shows, in words."""


def position_plot(report: Report) -> PositionPlot | None:
    """Lay out KL by position; None where no artifact has two ranges with a KL above zero."""
    measured = [
        (artifact, ranges)
        for artifact in report.artifacts
        if len(ranges := _drawable(artifact)) > 1
    ]
    shown = measured[:MOST_LINES]
    if not shown:
        return None
    ranges = [each for _, found in shown for each in found]
    place_x, x_ticks = _token_axis(max(each.stop for each in ranges))
    bounds = [bound for each in ranges for bound in _bounds(each)]
    place_y, y_ticks = _divergence_axis(bounds)
    return PositionPlot(
        lines=tuple(
            _line(number, artifact.name, found, place_x, place_y)
            for number, (artifact, found) in enumerate(shown, start=1)
        ),
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        left_out=len(measured) - len(shown),
        sentence=" ".join(_describe(artifact, found, len(shown)) for artifact, found in shown),
    )


def _drawable(artifact: ArtifactReport) -> list[PositionRange]:
    details = artifact.judgement.details
    found = details.positions if details else ()
    return [each for each in found if is_positive(each.kl.value)]


def _bounds(positions: PositionRange) -> tuple[float, float, float]:
    """Low, mean and high; a bound that a logarithmic axis lacks is the mean."""
    metric = positions.kl
    low = metric.low if is_positive(metric.low) else metric.value
    return low, metric.value, metric.high if is_positive(metric.high) else metric.value


def _middle(positions: PositionRange) -> float:
    return math.sqrt((positions.start + 1) * max(positions.stop, positions.start + 1))


def _line(
    number: int, name: str, ranges: Sequence[PositionRange], place_x: _Scale, place_y: _Scale
) -> PositionLine:
    xs = [round(place_x(_middle(each)), 1) for each in ranges]
    columns = [[round(place_y(bound), 1) for bound in _bounds(each)] for each in ranges]
    lows, means, highs = (list(column) for column in zip(*columns, strict=True))
    there, back = list(zip(xs, lows, strict=True)), list(zip(xs, highs, strict=True))[::-1]
    return PositionLine(
        number=number,
        name=name,
        line=_path(list(zip(xs, means, strict=True))),
        band=_path(there + back) + "Z",
        spots=tuple(
            Spot(
                x,
                y,
                f"{name}, {range_label(each)} tokens read: KL {format_significant(each.kl.value)} "
                f"({format_significant(each.kl.low)} to {format_significant(each.kl.high)})",
            )
            for x, y, each in zip(xs, means, ranges, strict=True)
        ),
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if number else 'M'}{x:g},{y:g}" for number, (x, y) in enumerate(points))


def _token_axis(longest: int) -> tuple[_Scale, tuple[Tick, ...]]:
    high = math.log10(max(longest, 2))

    def place(tokens: float) -> float:
        return LEFT + 6 + (RIGHT - LEFT - 12) * math.log10(max(tokens, 1)) / high

    steps = [4**power for power in range(12) if 4**power <= longest]
    return place, tuple(Tick(round(place(step), 1), f"{step:,}") for step in steps)


def _divergence_axis(values: Sequence[float]) -> tuple[_Scale, tuple[Tick, ...]]:
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(_PAD * (high - low), (_LEAST_DECADES - (high - low)) / 2)
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(value) - low) / (high - low)

    found = round_values(low, high)
    return place, tuple(Tick(round(place(value), 1), f"{value:.2g}") for value in found)


def _describe(artifact: ArtifactReport, ranges: Sequence[PositionRange], count: int) -> str:
    """Say where the divergence is largest and smallest."""
    largest = max(ranges, key=lambda each: each.kl.value)
    smallest = min(ranges, key=lambda each: each.kl.value)
    whose = f"{artifact.name}: largest" if count > 1 else "Largest"
    return (
        f"{whose} after {_tokens(largest)} ({format_significant(largest.kl.value)} nats), "
        f"smallest after {_tokens(smallest)} ({format_significant(smallest.kl.value)})."
    )


def _tokens(positions: PositionRange) -> str:
    label = range_label(positions)
    return f"{label} token{'' if label == '1' else 's'}"
