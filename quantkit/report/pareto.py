"""Geometry of the picture of a comparison: size to the right, distance upwards.

Everything here is numbers and plain text; the template draws and escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.records import ArtifactReport, Report, Verdict
from quantkit.report.axes import Tick, round_values
from quantkit.report.closeness import DISTANCE_WORDS, KL, common_distance, find_distance
from quantkit.report.layers import is_positive
from quantkit.report.rounding import format_bytes, format_significant

WIDTH, HEIGHT = 660, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 640, 34, 290
_PAD = 0.08
"""Share of an axis that stays free at either end."""


@dataclass(frozen=True)
class ParetoPoint:
    """One artifact. On the frontier no other one is both smaller and closer to the baseline."""

    x: float
    y: float
    low_y: float
    high_y: float
    name: str
    title: str
    verdict: Verdict
    on_frontier: bool
    label_left: bool
    """Whether the name stands to the left of the point, where it would leave the picture."""


@dataclass(frozen=True)
class ParetoPlot:
    """Points on a linear axis of bytes and a logarithmic one of distance; the frontier as a path.

    `y_label` says which distance that is.
    """

    y_label: str
    points: tuple[ParetoPoint, ...]
    frontier: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def has_line(self) -> bool:
        """Whether the frontier has more than one point."""
        return sum(point.on_frontier for point in self.points) > 1


def pareto_plot(report: Report) -> ParetoPlot | None:
    """Lay out the artifacts whose distance was measured; None for fewer than two of them."""
    kind = common_distance(report.artifacts)
    if kind is None:
        return None
    measured = [artifact for artifact in report.artifacts if is_positive(_distance(artifact, kind))]
    if len(measured) < 2:
        return None
    best = frontier(measured, kind)
    place_x, x_ticks = _size_axis([artifact.size_bytes for artifact in measured])
    bounds = [bound for artifact in measured for bound in _bounds(artifact, kind)]
    place_y, y_ticks = _distance_axis(bounds)
    points = tuple(
        _point(artifact, kind, place_x, place_y, on_frontier=artifact in best)
        for artifact in measured
    )
    edge = sorted((point.x, point.y) for point in points if point.on_frontier)
    path = " ".join(f"{'L' if number else 'M'}{x:g},{y:g}" for number, (x, y) in enumerate(edge))
    return ParetoPlot(DISTANCE_WORDS[kind][1], points, path, x_ticks, y_ticks)


def frontier(artifacts: Sequence[ArtifactReport], kind: str = KL) -> list[ArtifactReport]:
    """Return the artifacts that no other one beats in size and distance at once."""

    def beaten(artifact: ArtifactReport) -> bool:
        here = (artifact.size_bytes, _distance(artifact, kind))
        return any(
            there != here and there[0] <= here[0] and there[1] <= here[1]
            for there in ((other.size_bytes, _distance(other, kind)) for other in artifacts)
        )

    return [artifact for artifact in artifacts if not beaten(artifact)]


def _distance(artifact: ArtifactReport, kind: str) -> float:
    metric = find_distance(artifact, kind)
    return math.nan if metric is None else metric.value


def _bounds(artifact: ArtifactReport, kind: str) -> tuple[float, float, float]:
    """Mean, low and high of the distance; an interval that reaches 0 ends at the mean."""
    metric = find_distance(artifact, kind)
    if metric is None:
        raise ValueError("only measured artifacts have a place in the picture")
    low = metric.low if is_positive(metric.low) else metric.value
    return metric.value, low, metric.high if is_positive(metric.high) else metric.value


def _point(
    artifact: ArtifactReport,
    kind: str,
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    *,
    on_frontier: bool,
) -> ParetoPoint:
    value, low, high = _bounds(artifact, kind)
    x = place_x(artifact.size_bytes)
    return ParetoPoint(
        x=round(x, 1),
        y=round(place_y(value), 1),
        low_y=round(place_y(low), 1),
        high_y=round(place_y(high), 1),
        name=artifact.name,
        title=f"{artifact.name}: {format_bytes(artifact.size_bytes)}, "
        f"{DISTANCE_WORDS[kind][0]} {format_significant(value, 3)}",
        verdict=artifact.judgement.verdict,
        on_frontier=on_frontier,
        label_left=x > (LEFT + RIGHT) / 2,
    )


def _size_axis(sizes: Sequence[int]) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    low, high = min(sizes), max(sizes)
    span = (high - low) or max(high, 1)
    first, last = low - _PAD * span, high + _PAD * span

    def place(size: float) -> float:
        return LEFT + (RIGHT - LEFT) * (size - first) / (last - first)

    step = 10.0 ** math.floor(math.log10(last - first))
    step = next(s for s in (step / 5, step / 2, step, 2 * step, 5 * step) if (last - first) / s < 7)
    numbers = range(math.ceil(first / step), math.floor(last / step) + 1)
    return place, tuple(
        Tick(round(place(number * step), 1), format_bytes(round(number * step)))
        for number in numbers
    )


def _distance_axis(values: Sequence[float]) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(_PAD * (high - low), 0.1)
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(value) - low) / (high - low)

    found = round_values(low, high)
    return place, tuple(Tick(round(place(value), 1), f"{value:.2g}") for value in found)
