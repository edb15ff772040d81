"""The picture of a comparison, and what a comparison says in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantkit.records import ArtifactReport, KvRecord, Metric, Report
from quantkit.report.advice import verdict_sentence
from quantkit.report.html import render_html
from quantkit.report.kv import kv_rows
from quantkit.report.markdown import render_markdown
from quantkit.report.pareto import BOTTOM, LEFT, RIGHT, TOP, frontier, pareto_plot
from tests.report.sample import make_judgement, make_report


def make_artifact(name: str, size: int, kl: float, verdict: str = "PASS") -> ArtifactReport:
    """An artifact with a size and a divergence."""
    judgement = replace(
        make_judgement("PASS" if verdict == "PASS" else "FAIL"),
        kl=Metric(kl, 0.9 * kl, 1.1 * kl, p99=kl, maximum=kl),
    )
    base = make_report().artifacts[0]
    return replace(base, name=name, size_bytes=size, judgement=judgement)


def make_comparison(*artifacts: ArtifactReport) -> Report:
    """A report in which artifacts compete."""
    return replace(make_report(), artifacts=artifacts, layers=(), comparison=True)


SMALL = make_artifact("small", 4_000_000, 0.02)
LARGE = make_artifact("large", 8_000_000, 0.001)
BEATEN = make_artifact("beaten", 8_000_000, 0.03, "FAIL")


def test_the_frontier_holds_what_is_not_beaten_in_both() -> None:
    """Equal artifacts stay on it together: neither beats the other."""
    twin = replace(SMALL, name="twin")
    assert frontier([SMALL, LARGE, BEATEN, twin]) == [SMALL, LARGE, twin]


def test_points_lie_inside_the_axes_and_better_is_lower_left() -> None:
    """Smaller is further left, closer to the baseline further down."""
    plot = pareto_plot(make_comparison(SMALL, LARGE, BEATEN))
    assert plot is not None
    small, large, beaten = plot.points
    assert small.x < large.x == beaten.x
    assert large.y > small.y > beaten.y
    assert all(LEFT <= point.x <= RIGHT for point in plot.points)
    assert all(TOP <= point.high_y <= point.low_y <= BOTTOM for point in plot.points)
    assert [point.on_frontier for point in plot.points] == [True, True, False]
    assert len(plot.x_ticks) >= 2
    assert len(plot.y_ticks) >= 3


def test_a_line_is_spoken_of_where_there_is_one() -> None:
    """One artifact that is beaten by none is a point."""
    words = "On the line no artifact is beaten in both."
    better = replace(SMALL, name="better", size_bytes=3_000_000)

    assert words in render_html(make_comparison(SMALL, LARGE))
    assert words not in render_html(make_comparison(better, BEATEN))


def test_there_is_no_picture_of_one_artifact_or_of_unmeasured_ones() -> None:
    """A KL of zero has no place on a logarithmic axis either."""
    unmeasured = replace(LARGE, judgement=make_judgement("UNJUDGED"))
    assert pareto_plot(make_comparison(SMALL, unmeasured)) is None
    assert pareto_plot(make_comparison(SMALL)) is None


@pytest.mark.parametrize(
    ("artifacts", "words"),
    [
        (
            (SMALL, LARGE, BEATEN),
            "small is the smallest (4.00 MB, KL 0.0200), large the closest to the baseline "
            "(8.00 MB, KL 0.00100; 2.00× the size).",
        ),
        ((LARGE, BEATEN), "1 of 2 artifacts holds every limit: take large (8.00 MB, KL 0.00100)."),
        ((BEATEN,), "The only artifact did not pass (failed)."),
        (
            (BEATEN, replace(BEATEN, name="worse", judgement=make_judgement("UNJUDGED"))),
            "None of 2 artifacts passed (1 failed, 1 not measured); the closest is beaten "
            "(8.00 MB, KL 0.0300).",
        ),
    ],
)
def test_a_comparison_says_which_artifact_to_take(
    artifacts: tuple[ArtifactReport, ...], words: str
) -> None:
    """Those that fail are not recommended, however small."""
    assert words in verdict_sentence(make_comparison(*artifacts))


def test_the_picture_and_hostile_names_reach_the_page_escaped() -> None:
    """A folder may be called anything."""
    hostile = replace(SMALL, name="<script>alert(1)</script>")
    page = render_html(make_comparison(hostile, LARGE))
    assert "Size against divergence" in page
    assert "<script>alert" not in page


def test_scales_of_the_kv_cache_are_shown() -> None:
    """One figure a layer stays one, one a head becomes a range."""
    record = KvRecord("model.layers.0.self_attn", (0.02, 0.5), (0.01,), (7.5, 200.0), (3.0, 3.0))
    (row,) = kv_rows([record])
    assert (row.key_scale, row.value_scale, row.value_absmax) == (
        "0.0200 to 0.500",
        "0.0100",
        "3.00",
    )
    report = replace(make_report(), kv_cache=(record,))
    assert "0.0200 to 0.500" in render_html(report)
    assert "0.0200 to 0.500" in render_markdown(report)
