from __future__ import annotations

import math
from dataclasses import replace

import pytest

from quantkit.records import Check, Metric
from quantkit.report.html import render_html
from quantkit.report.markdown import render_markdown
from quantkit.report.model_card import render_model_card
from quantkit.report.rounding import (
    format_bytes,
    format_divergences,
    format_pair,
    format_percent,
    format_ratio,
    format_seconds,
    format_significant,
    format_together,
)
from quantkit.report.rows import (
    check_rows,
    describe_samples,
    headline_cells,
    headline_rows,
)
from tests.report.sample import make_report


def test_headline_row_rounds_each_figure_for_people() -> None:
    """A row has size, ratio, bits, perplexity, KL and agreement with their intervals."""
    (row,) = headline_rows(make_report("PASS"))

    assert (row.size, row.size_ratio, row.bits_per_weight) == ("4.11 MB", "3.06× smaller", "5.23")
    assert row.perplexity == "12.41 → 12.64"
    assert (row.perplexity_increase, row.perplexity_interval) == ("+1.83%", "+1.52% to +2.14%")
    assert (row.kl, row.kl_interval) == ("0.0123", "0.0118 to 0.0128")
    assert (row.top1_agreement, row.top1_interval) == ("94.2%", "93.8% to 94.6%")
    assert row.verdict == "PASS"


def test_unjudged_row_shows_no_figure_that_was_not_measured() -> None:
    """What the gate did not measure is a dash, and its interval is empty."""
    (row,) = headline_rows(make_report("UNJUDGED"))

    assert (row.perplexity, row.kl, row.top1_agreement) == ("–", "–", "–")
    assert (row.perplexity_interval, row.kl_interval, row.top1_interval) == ("", "", "")
    assert headline_cells([row])[0]["KL (nats)"] == "–"


@pytest.mark.parametrize(
    ("runtime", "where"),
    [
        ("transformers", "128 windows of text in transformers"),
        ("vllm", "128 windows of text in vllm"),
        (
            "llama.cpp",
            "128 windows of text, the artifact in llama.cpp and the baseline in transformers",
        ),
        (
            "onnxruntime",
            "128 windows of text, the artifact in onnxruntime and the baseline in transformers",
        ),
    ],
)
def test_every_page_says_where_each_of_the_two_models_ran(runtime: str, where: str) -> None:
    """Runtimes that load no checkpoints have their baselines in transformers."""
    report = make_report()
    artifact = replace(report.artifacts[0], runtime=runtime)
    report = replace(report, artifacts=(artifact,))

    assert describe_samples(artifact) == where
    assert f"the same {where}" in render_html(report)
    assert f"the same {where};" in render_markdown(report)
    assert f"the same {where};" in render_model_card(report, artifact)


def test_a_divergence_is_written_one_way_whatever_stands_beside_it() -> None:
    """In the headline, and beside a limit that is larger by far."""
    metric = Metric(0.008154, 0.007441, 0.009033)
    judgement = replace(
        make_report().artifacts[0].judgement,
        kl=metric,
        checks=(Check("max_kl", 0.05, metric.value, metric.low, metric.high, "PASS"),),
    )
    report = make_report()
    report = replace(report, artifacts=(replace(report.artifacts[0], judgement=judgement),))

    (headline,) = headline_rows(report)
    (check,) = check_rows(judgement)

    assert (headline.kl, headline.kl_interval) == ("0.00815", "0.00744 to 0.00903")
    assert (check.value, check.interval) == (headline.kl, headline.kl_interval)
    assert check.limit == "at most 0.0500"
    assert format_divergences(0.04999, 0.05) == ("0.04999", "0.05000")
    assert format_divergences(0.0, math.nan, 1.0) == ("0", "not finite", "1.00")


def test_headline_cells_hold_figure_and_interval_in_one_line() -> None:
    """The cells of a plain table carry the interval behind the figure."""
    (cells,) = headline_cells(headline_rows(make_report("PASS")))

    assert cells["Size"] == "4.11 MB (3.06× smaller)"
    assert cells["Perplexity"] == "12.41 → 12.64 (+1.83%; +1.52% to +2.14%)"
    assert cells["Verdict"] == "PASS"


def test_check_rows_say_limit_value_and_direction() -> None:
    """Upper and lower limits are told apart in words."""
    perplexity, kl, agreement = check_rows(make_report("FAIL").artifacts[0].judgement)

    assert (perplexity.label, perplexity.limit, perplexity.value) == (
        "Perplexity increase",
        "at most 3.00%",
        "9.12%",
    )
    assert kl.is_upper
    assert (agreement.limit, agreement.is_upper) == ("at least 90.0%", False)


def test_value_just_over_its_limit_does_not_look_equal_to_it() -> None:
    """Decimals are added until the limit and the value differ."""
    judgement = make_report("FAIL").artifacts[0].judgement
    near = Check("max_kl", 0.05, 0.050004, 0.05, 0.051, "FAIL")

    (row,) = check_rows(replace(judgement, checks=(near,)))

    assert (row.limit, row.value) == ("at most 0.050000", "0.050004")


def test_check_of_an_unknown_name_is_shown_by_its_name() -> None:
    """A check that the tables do not know, as of a task, is shown as a plain number."""
    judgement = make_report("PASS").artifacts[0].judgement
    check = Check("max_arc_easy_loss", 1.5, 0.25, 0.125, 0.5, "PASS")

    (row,) = check_rows(replace(judgement, checks=(check,)))

    assert (row.label, row.value) == ("Arc easy loss", "0.25")


def test_numbers_that_are_not_finite_are_said_in_words() -> None:
    """A NaN perplexity reads as `not finite`, in no format as `nan`."""
    report = make_report("FAIL")
    broken = Metric(math.nan, math.nan, math.inf, baseline=12.4, increase=math.nan)
    judgement = replace(report.artifacts[0].judgement, perplexity=broken)

    (row,) = headline_rows(
        replace(report, artifacts=(replace(report.artifacts[0], judgement=judgement),))
    )

    assert row.perplexity == "12.40 → not finite"
    assert row.perplexity_increase == "not finite"


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_113_408, "4.11 MB"),
        (999_600_000, "1.00 GB"),
    ],
)
def test_bytes_are_shown_in_decimal_units(size: int, shown: str) -> None:
    """Three digits and a unit, never `1000 MB`."""
    assert format_bytes(size) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1.0, "1.00"), (123456.0, "123456"), (1e-7, "1.00e-07"), (1e300, "1.00e+300")],
)
def test_significant_digits_keep_three(value: float, shown: str) -> None:
    """Large and small numbers get an exponent, others do not."""
    assert format_significant(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.314, "0.314 s"), (61.7, "1 min 2 s"), (3600.0, "1 h 0 min"), (math.nan, "not finite")],
)
def test_durations_are_shown_in_two_units_at_the_most(seconds: float, shown: str) -> None:
    """Seconds below a minute, then minutes, then hours."""
    assert format_seconds(seconds) == shown


def test_ratio_says_smaller_or_larger() -> None:
    """An artifact that grew is not called smaller, and without sizes there is no ratio."""
    assert format_ratio(25, 100) == "4.00× smaller"
    assert format_ratio(110, 100) == "1.10× larger"
    assert format_ratio(0, 100) == format_ratio(100, 0) == "–"


def test_pair_is_told_apart_where_four_digits_are_too_few() -> None:
    """12.41234 and 12.41250 get a fifth digit."""
    first, second = format_pair(12.41230, 12.41250)

    assert first != second


def test_a_zero_has_no_minus() -> None:
    """What is below the last digit is nothing."""
    assert format_together((-1e-12, 0.012)) == ("0.0000", "0.0120")
    assert format_together((-1e-12, 0.012), percent=True, sign=True)[0] == "+0.00%"


def test_huge_percentages_are_short() -> None:
    """The increase of a model that broke is an exponent, not three hundred digits."""
    shown = format_together((1e304, 1e303, 1.1e304), percent=True, sign=True)

    assert shown[0] == "+1e+306%"
    assert format_percent(math.inf) == "not finite"
