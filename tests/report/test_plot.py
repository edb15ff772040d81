from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from quantkit.records import LayerRecord
from quantkit.report import plot
from quantkit.report.bars import check_bar
from quantkit.report.plot import error_plot
from tests.report.sample import make_check, make_layers


def made(layers: tuple[LayerRecord, ...]) -> plot.ErrorPlot:
    found = error_plot(layers)
    assert found is not None
    return found


def test_marks_lie_where_their_errors_are_on_a_logarithmic_scale() -> None:
    """Equal ratios are equal distances, larger errors are higher, blocks go to the right."""
    base = make_layers(1)[0]
    errors = (1e-4, 1e-3, 1e-2)
    layers = tuple(
        replace(
            base,
            name=f"model.layers.{block}.mlp.up_proj",
            relative_error=error,
            rtn_relative_error=None,
        )
        for block, error in enumerate(errors)
    )
    (panel,) = made(layers).panels
    ys = [mark.y for mark in panel.marks]

    assert ys[0] > ys[1] > ys[2]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    assert [mark.x for mark in panel.marks] == sorted(mark.x for mark in panel.marks)
    assert panel.rounding_marks == ()


@pytest.mark.parametrize("blocks", [1, 2, 32, 200])
def test_everything_stays_inside_of_the_frame(blocks: int) -> None:
    """No mark or label leaves the picture, whatever the number of blocks."""
    drawn = made(make_layers(blocks))

    for panel in drawn.panels:
        for mark in (*panel.marks, *panel.rounding_marks):
            assert plot.LEFT <= mark.x <= plot.RIGHT
            assert plot.TOP <= mark.high_y <= mark.y <= mark.low_y <= plot.BOTTOM
    for tick in drawn.y_ticks:
        assert plot.TOP <= tick.position <= plot.BOTTOM


@pytest.mark.parametrize("blocks", [1, 2, 7, 32, 61, 200])
def test_labels_of_the_axes_do_not_overlap(blocks: int) -> None:
    """There are a few labels on each axis, with room between them."""
    drawn = made(make_layers(blocks))
    xs = [tick.position for tick in drawn.x_ticks]
    ys = sorted(tick.position for tick in drawn.y_ticks)

    assert 1 <= len(xs) <= 7
    assert all(right - left >= 20 for left, right in pairwise(xs))
    assert 2 <= len(ys) <= 6
    assert all(below - above >= 11 for above, below in pairwise(ys))


@pytest.mark.parametrize("span", [1.0, 1.3, 3.0, 10.0, 1e3, 1e7, 1e12])
def test_error_axis_has_readable_labels_for_any_range(span: float) -> None:
    """From equal errors to twelve decades there are two to six labels, all different."""
    base = make_layers(1)[0]
    layers = tuple(
        replace(
            base, name=f"model.layers.{block}.up", relative_error=error, rtn_relative_error=None
        )
        for block, error in enumerate((1e-13, 1e-13 * span))
    )
    ticks = made(layers).y_ticks

    assert 2 <= len(ticks) <= 6
    assert len({tick.label for tick in ticks}) == len(ticks)


def test_line_is_broken_where_a_block_has_no_such_layer() -> None:
    """A gap is not bridged by a line that would claim a value."""
    layers = tuple(layer for layer in make_layers(6) if ".3." not in layer.name)

    assert made(layers).panels[0].line.count("M") == 2


def test_experts_of_a_block_become_one_mark_with_a_range() -> None:
    """128 experts do not make 128 panels; the mark is their median."""
    base = make_layers(1)[0]
    layers = tuple(
        replace(
            base,
            name=f"model.layers.{block}.mlp.experts.{expert}.up_proj",
            relative_error=0.001 * (1 + expert),
        )
        for block in range(4)
        for expert in range(9)
    )
    (panel,) = made(layers).panels

    assert len(panel.marks) == 4
    assert panel.marks[0].is_range
    assert panel.marks[0].title == "block 0: 0.500% (median of 9)"


def test_without_statistics_the_weight_error_is_drawn() -> None:
    """Plain rounding without data has no output error; there is nothing to compare with either."""
    drawn = made(make_layers(3, statistics=False))

    assert not drawn.of_output
    assert not drawn.has_rounding


def test_layers_without_a_place_are_counted() -> None:
    """A zero, a NaN and a layer outside of the blocks are left to the table."""
    first, second, third, *rest = make_layers(2)
    layers = (
        replace(first, relative_error=0.0),
        replace(second, relative_error=math.nan),
        replace(third, name="lm_head"),
        *rest,
    )

    assert made(layers).left_out == 3
    assert error_plot((replace(first, name="lm_head"),)) is None
    assert error_plot(()) is None


def test_fallback_is_marked() -> None:
    """A layer that got something else than asked for has a mark of its own."""
    drawn = made(make_layers(3, fallback="rtn: singular"))

    assert drawn.has_fallback
    assert [mark.fallback for mark in drawn.panels[-1].marks] == [False, False, True]
    assert not any(mark.fallback for mark in drawn.panels[-1].rounding_marks)


@pytest.mark.parametrize("value", [0.001, 0.02, 0.05, 0.3, 900.0])
def test_bar_of_an_upper_limit_allows_what_lies_left_of_it(value: float) -> None:
    """Limit, value and interval lie in their order; the allowed part ends at the limit."""
    bar = check_bar(make_check("max_kl", 0.05, value, value / 10), is_upper=True, is_share=False)

    assert bar is not None
    assert 0 <= bar.low <= bar.value <= bar.high <= 100
    assert (bar.value <= bar.limit) == (value <= 0.05)
    assert (bar.allowed_start, bar.allowed_end) == (0, bar.limit)


@pytest.mark.parametrize("value", [0.1, 0.89, 0.95, 0.999])
def test_bar_of_a_lower_limit_allows_what_lies_right_of_it(value: float) -> None:
    """The allowed part reaches from the limit to the end."""
    check = make_check("min_top1_agreement", 0.9, value, 0.0005)
    bar = check_bar(check, is_upper=False, is_share=True)

    assert bar is not None
    assert 0 <= bar.low <= bar.value <= bar.high <= 100
    assert (bar.value >= bar.limit) == (value >= 0.9)
    assert (bar.allowed_start, bar.allowed_end) == (bar.limit, 100)


def test_bar_of_numbers_that_are_not_finite_is_not_drawn() -> None:
    """There is no place for a NaN on an axis."""
    check = make_check("max_kl", 0.05, math.nan, 0.1)

    assert check_bar(check, is_upper=True, is_share=False) is None


def test_bar_of_equal_numbers_is_drawn() -> None:
    """A limit, a value and an interval that are all one number do not divide by zero."""
    for value in (0.0, 1.0):
        check = make_check("min_top1_agreement", value, value, 0.0)
        assert check_bar(check, is_upper=False, is_share=True) is not None
        assert check_bar(check, is_upper=True, is_share=False) is not None
