"""Figures of details, probes, tasks and footprints, and where texts and lines are cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from quantkit.records import Difference, Footprint, Metric, PositionRange, Report
from quantkit.report.details import domain_rows, metric_rows, range_label
from quantkit.report.footprints import (
    difference_rows,
    footprint_notes,
    footprint_rows,
    order_sentence,
)
from quantkit.report.partings import show_token, split_common
from quantkit.report.positions import BOTTOM, LEFT, MOST_LINES, RIGHT, TOP, position_plot
from quantkit.report.probes import probe_rows, probe_sentence, task_rows
from tests.report.measured import RANGES, make_comparison, make_measured_report
from tests.report.sample import make_report


def make_range(start: int, stop: int, kl: float, low: float | None = None) -> PositionRange:
    metric = Metric(kl, 0.9 * kl if low is None else low, 1.1 * kl)
    return PositionRange(start, stop, metric, Metric(0.9, 0.9, 0.9))


def with_positions(*positions: PositionRange) -> Report:
    report = make_measured_report()
    (artifact,) = report.artifacts
    assert artifact.judgement.details is not None
    details = replace(artifact.judgement.details, positions=positions)
    judgement = replace(artifact.judgement, details=details)
    return replace(report, artifacts=(replace(artifact, judgement=judgement),))


def test_positions_are_named_by_the_tokens_that_were_read() -> None:
    """Position 0 has read one token."""
    labels = [range_label(make_range(start, stop, 1)) for start, stop in RANGES]

    assert labels == ["1", "2–4", "5–16", "17–64", "65–256", "257–511"]
    assert range_label(make_range(1023, 4096, 1)) == "1,024–4,096"


def test_lines_lie_inside_the_axes_and_more_divergence_is_higher() -> None:
    """Bands hold their line, and no more lines are drawn than can be told apart."""
    plot = position_plot(make_comparison(tuple("abcdefgh")))
    assert plot is not None

    assert len(plot.lines) == MOST_LINES
    assert plot.left_out == 2
    for line in plot.lines:
        assert [spot.x for spot in line.spots] == sorted(spot.x for spot in line.spots)
        assert all(LEFT <= spot.x <= RIGHT and TOP <= spot.y <= BOTTOM for spot in line.spots)
    assert plot.lines[0].spots[0].y < plot.lines[1].spots[0].y
    assert "demo-llama-a.gguf: largest after 1 token (0.187 nats), smallest after 257–511" in (
        plot.sentence
    )


@pytest.mark.parametrize("lowest", [0.0, -0.1, math.nan])
def test_an_interval_that_reaches_zero_ends_at_the_mean(lowest: float) -> None:
    """A logarithmic axis has no zero; the table has the bound."""
    plot = position_plot(with_positions(make_range(0, 1, 0.1, lowest), make_range(1, 4, 0.05)))
    assert plot is not None
    first = plot.lines[0].spots[0]

    assert plot.lines[0].band.startswith(f"M{first.x:g},{first.y:g} ")


def test_a_single_range_or_none_above_zero_is_no_picture() -> None:
    """A line wants two ends."""
    assert position_plot(with_positions(make_range(0, 8, 0.1))) is None
    assert position_plot(with_positions(make_range(0, 1, 0), make_range(1, 2, math.nan))) is None
    assert position_plot(make_report()) is None


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ("the same text", "the same text", "the same text"),
        ("they went", "then left", ""),
        ("and they went", "and then left", "and "),
        ("one", "one two", ""),
        ("one ", "one two", "one "),
        ("", "x", ""),
        ("x" * 60 + "a", "x" * 60 + "b", "x" * 60),
    ],
)
def test_texts_are_cut_before_the_word_in_which_they_part(
    first: str, second: str, common: str
) -> None:
    """A word half of which is common is no place to read on from; a long run is cut where it is."""
    assert split_common(first, second) == (common, first[len(common) :], second[len(common) :])


def test_white_space_of_a_token_can_be_seen() -> None:
    """Most tokens begin with a space."""
    assert [show_token(text) for text in (" the", "\n\n", "\t", "", "a b")] == [
        "␣the",
        "↵↵",
        "⇥",
        "(nothing)",
        "a␣b",
    ]


def test_probes_and_tasks_are_written_in_their_units() -> None:
    """Shares as percentages, shifts in nats, ratios with a sign; the limit with its direction."""
    (artifact,) = make_measured_report("FAIL").artifacts

    assert [(row.value, row.limit) for row in probe_rows(artifact)] == [
        ("37.5%", "at most 25.0%"),
        ("12.5%", "at most 50.0%"),
        ("–", "at most 25.0%"),
        ("0.313 nats", "–"),
        ("1.62×", "at most 3.00×"),
    ]
    assert probe_sentence(probe_rows(artifact)[2]).startswith("Lost JSON answers not looked at: ")
    first, second = task_rows(artifact)
    assert (first.recovery, first.interval, first.limit) == (
        "93.1%",
        "91.9% to 94.3%",
        "at least 97.0%",
    )
    assert (first.p_value, second.p_value) == ("0.388", "–")
    tiny = replace(artifact.judgement.tasks[0], p_value=1e-9)
    tiny_artifact = replace(artifact, judgement=replace(artifact.judgement, tasks=(tiny,)))
    assert task_rows(tiny_artifact)[0].p_value == "< 0.001"


def test_flips_are_what_was_lost_and_won() -> None:
    """The two shares sum to the third."""
    (row,) = metric_rows(make_measured_report())

    assert row.flips == ("5.12%", "4.86% to 5.38%")
    assert row.lost_won == "3.01% / 2.11%"


def test_kinds_of_text_of_a_comparison_stand_together() -> None:
    """One kind after the other, each with all artifacts."""
    names = [row.name for row in domain_rows(make_comparison(("a", "b")))]

    assert names == ["code", "code", "documentation", "documentation", "tables", "tables"]


def test_what_was_timed_is_said_once_where_it_is_the_same() -> None:
    """And by name where it differs, as of a baseline in another runtime."""
    rows = footprint_rows(make_comparison())
    assert [row.artifact for row in rows[:2]] == ["baseline", "demo-llama-IQ3_M.gguf"]
    assert len(footprint_notes(rows)) == 2

    (note,) = footprint_notes(rows[1:])
    assert note == "Weights as in the file, a prompt of 256 tokens and 64 behind it."


def test_a_footprint_without_speeds_has_dashes() -> None:
    """A runtime that was not timed."""
    report = replace(
        make_report(), baseline_footprint=Footprint("vllm", 75.2, None, None, None, 1, "")
    )
    (row,) = footprint_rows(report)

    assert (row.load, row.memory, row.prefill, row.decoding) == ("1 min 15 s", "–", "–", "–")
    assert row.where == "vllm, 1 thread"
    assert footprint_notes([row]) == ()


def test_the_closer_of_a_pair_comes_first() -> None:
    """Whichever way the difference was taken."""
    apart = Difference("a", "b", 64, Metric(0.02, 0.01, 0.03), True)
    report = replace(make_report(), differences=(apart,))
    (row,) = difference_rows(report)
    assert (row.closer, row.further, row.difference, row.interval) == (
        "b",
        "a",
        "0.0200",
        "0.0100 to 0.0300",
    )

    turned = Difference("b", "a", 64, Metric(-0.02, -0.03, -0.01), True)
    assert difference_rows(replace(report, differences=(turned,))) == (row,)


def test_the_order_names_what_is_not_told_apart() -> None:
    """And says nothing where a neighbour was not compared."""
    report = make_comparison(("a", "b", "c"))

    assert order_sentence(report) == (
        "From the closest to the furthest: demo-llama-c.gguf and demo-llama-b.gguf (not told "
        "apart), then demo-llama-a.gguf."
    )
    alike = tuple(replace(each, significant=False) for each in report.differences)
    assert order_sentence(replace(report, differences=alike)).startswith("No neighbours")
    assert order_sentence(replace(report, differences=report.differences[:1])) == ""
    assert order_sentence(make_report()) == ""
