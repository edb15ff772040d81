"""Geometry of the error plot: one small panel for each kind of linear layer.

Everything here is numbers and plain text; the template draws and escapes it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from quantkit.records import LayerRecord
from quantkit.report.axes import Tick, round_values
from quantkit.report.layers import (
    geometric_mean,
    is_positive,
    locate,
    output_error,
    plain_output_error,
    rounding_ratio,
    short_kinds,
)
from quantkit.report.rounding import format_percent

WIDTH, HEIGHT = 300, 176
LEFT, RIGHT, TOP, BOTTOM = 46, 290, 10, 148
_MOST_X_LABELS = 6
_LEAST_DECADES = 0.8
"""A shorter axis would blow up differences that mean nothing."""


@dataclass(frozen=True)
class Mark:
    """What one block contributes to a panel: the median, and the range of several layers."""

    x: float
    y: float
    low_y: float
    high_y: float
    title: str
    fallback: bool

    @property
    def is_range(self) -> bool:
        """Whether the block holds several layers of this kind, as experts are."""
        return abs(self.low_y - self.high_y) > 0.5


@dataclass(frozen=True)
class Panel:
    """One kind of linear layer over all blocks."""

    title: str
    summary: str
    marks: tuple[Mark, ...]
    line: str
    """SVG path of ours; broken where a block has no such layer."""
    rounding_marks: tuple[Mark, ...]
    rounding_line: str


@dataclass(frozen=True)
class ErrorPlot:
    """Panels with the same axes: blocks to the right, error upwards on a logarithmic scale."""

    of_output: bool
    """Whether the error is of the output; otherwise of the weight, as no statistics were taken."""
    panels: tuple[Panel, ...]
    y_ticks: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]
    has_rounding: bool
    has_fallback: bool
    left_out: int
    """Layers that a logarithmic scale or the axis of blocks has no place for."""


@dataclass(frozen=True)
class _Point:
    """One layer's error, at its place in the model."""

    block: int
    kind: str
    error: float
    fallback: bool


_Scale = Callable[[float], float]


def error_plot(layers: Sequence[LayerRecord]) -> ErrorPlot | None:
    """Lay out the error of each layer, ours against plain rounding.

    The error is of the output where any layer has one, else of the weight. Returns None where
    nothing can be drawn.
    """
    ours = _points(layers, output_error)
    of_output = bool(ours)
    rounding: list[_Point] = []
    if of_output:
        rounding = _points(layers, plain_output_error, ours=False)
    else:
        ours = _points(layers, lambda layer: layer.weight_error)
    if not ours:
        return None
    first, last = min(p.block for p in ours), max(p.block for p in ours)
    rounding = [point for point in rounding if first <= point.block <= last]
    scale_x = _block_scale(first, last)
    scale_y, y_ticks = _error_scale([point.error for point in (*ours, *rounding)])
    kinds = list(dict.fromkeys(point.kind for point in ours))
    titles = short_kinds(kinds)
    ratios = _ratios(layers)
    panels = tuple(
        _panel(
            titles[kind],
            ratios.get(kind, []),
            [point for point in ours if point.kind == kind],
            [point for point in rounding if point.kind == kind],
            scale_x,
            scale_y,
        )
        for kind in kinds
    )
    return ErrorPlot(
        of_output=of_output,
        panels=panels,
        y_ticks=y_ticks,
        x_ticks=_block_ticks(first, last, scale_x),
        has_rounding=bool(rounding),
        has_fallback=any(point.fallback for point in ours),
        left_out=len(layers) - len(ours),
    )


def _points(
    layers: Iterable[LayerRecord],
    error: Callable[[LayerRecord], float | None],
    *,
    ours: bool = True,
) -> list[_Point]:
    """The layers that have a place on both axes: in a block, with an error above zero."""
    points = []
    for layer in layers:
        block, kind = locate(layer.name)
        value = error(layer)
        if block is not None and value is not None and is_positive(value):
            points.append(_Point(block, kind, value, ours and bool(layer.fallback)))
    return points


def _ratios(layers: Iterable[LayerRecord]) -> dict[str, list[float]]:
    """Kind -> output errors as multiples of plain rounding's."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        ratio = rounding_ratio(layer)
        if ratio is not None:
            found.setdefault(locate(layer.name)[1], []).append(ratio)
    return found


def _panel(
    title: str,
    ratios: Sequence[float],
    ours: Sequence[_Point],
    rounding: Sequence[_Point],
    scale_x: _Scale,
    scale_y: _Scale,
) -> Panel:
    mean = geometric_mean(ratios)
    marks = _marks(ours, "", scale_x, scale_y)
    rounding_marks = _marks(rounding, "plain rounding ", scale_x, scale_y)
    return Panel(
        title=title,
        summary="" if mean is None else f"{mean:.2f}× plain rounding",
        marks=tuple(marks.values()),
        line=_path(marks.items()),
        rounding_marks=tuple(rounding_marks.values()),
        rounding_line=_path(rounding_marks.items()),
    )


def _marks(
    points: Iterable[_Point], word: str, scale_x: _Scale, scale_y: _Scale
) -> dict[int, Mark]:
    """Block -> its mark, in the order of the blocks."""
    by_block: dict[int, list[_Point]] = {}
    for point in points:
        by_block.setdefault(point.block, []).append(point)
    return {
        block: _mark(block, found, word, scale_x, scale_y)
        for block, found in sorted(by_block.items())
    }


def _mark(
    block: int, points: Sequence[_Point], word: str, scale_x: _Scale, scale_y: _Scale
) -> Mark:
    errors = [point.error for point in points]
    middle = statistics.median(errors)
    many = f" (median of {len(errors)})" if len(errors) > 1 else ""
    return Mark(
        x=round(scale_x(block), 1),
        y=round(scale_y(middle), 1),
        low_y=round(scale_y(min(errors)), 1),
        high_y=round(scale_y(max(errors)), 1),
        title=f"block {block}: {word}{format_percent(middle)}{many}",
        fallback=any(point.fallback for point in points),
    )


def _path(marks: Iterable[tuple[int, Mark]]) -> str:
    """Lines between neighbouring blocks: `M46,20 L52,24`."""
    steps: list[str] = []
    previous = None
    for block, mark in marks:
        joined = previous is not None and block == previous + 1
        steps.append(f"{'L' if joined else 'M'}{mark.x:g},{mark.y:g}")
        previous = block
    return " ".join(steps)


def _block_scale(first: int, last: int) -> _Scale:
    def place(block: float) -> float:
        if first == last:
            return (LEFT + RIGHT) / 2
        return LEFT + 6 + (RIGHT - LEFT - 12) * (block - first) / (last - first)

    return place


def _block_ticks(first: int, last: int, place: _Scale) -> tuple[Tick, ...]:
    steps = (step * 10**power for power in range(7) for step in (1, 2, 4, 5, 8))
    step = next(step for step in steps if (last - first) / step <= _MOST_X_LABELS)
    start = math.ceil(first / step) * step
    return tuple(Tick(round(place(block), 1), str(block)) for block in range(start, last + 1, step))


def _error_scale(values: Sequence[float]) -> tuple[_Scale, tuple[Tick, ...]]:
    """Map errors to heights, with labels at decades, or at 1-2-5 where the range is short."""
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(0.06 * (high - low), (_LEAST_DECADES - (high - low)) / 2)
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(value) - low) / (high - low)

    found = round_values(low, high)
    while len(found) > 6:
        found = found[::2]
    return place, tuple(Tick(round(place(value), 1), _tick_label(value)) for value in found)


def _tick_label(value: float) -> str:
    """A short percentage: `0.01%`, `3%`."""
    percent = 100 * value
    return f"{percent:.6f}".rstrip("0").rstrip(".") + "%" if percent >= 1e-4 else f"{percent:.2g}%"
