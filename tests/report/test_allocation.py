"""The section that says why each layer has its scheme."""

from __future__ import annotations

from dataclasses import replace

from quantkit.records import AllocatedUnit, Allocation, Report, UnitCost
from quantkit.report.allocation import allocation_line, allocation_table, name_unit
from quantkit.report.html import render_html
from quantkit.report.markdown import render_markdown
from tests.report.sample import make_report


def make_unit(block: int, kinds: tuple[str, ...], chosen: str, kl: float) -> AllocatedUnit:
    costs = (
        UnitCost("w4a16", kl, 1_000_000),
        UnitCost("w8a16", kl / 200, 2_000_000),
        UnitCost("none", 0.0, 4_000_000),
    )
    return AllocatedUnit(tuple(f"model.layers.{block}.{kind}" for kind in kinds), costs, chosen)


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def make_allocation(*, target_bits: float | None = 6.6, max_kl: float | None = None) -> Allocation:
    units = (
        make_unit(0, ATTENTION, "w8a16", 0.004),
        make_unit(0, ("mlp.down_proj",), "none", 0.02),
        make_unit(1, ATTENTION, "w4a16", 0.0005),
        make_unit(1, ("mlp.down_proj",), "w4a16", 0.0004),
    )
    return Allocation(units, 4096, target_bits, max_kl, 0.00092, 6.5871)


def test_types_of_a_gguf_file_are_called_types() -> None:
    """With the bits that they take, scales included."""
    costs = (
        UnitCost("Q4_K", 0.003, 1_000),
        UnitCost("Q8_0", 0.0001, 1_900),
        UnitCost("Q3_K", 0.009, 800),
    )
    units = tuple(
        AllocatedUnit((f"model.layers.{block}.mlp.up_proj",), costs, chosen)
        for block, chosen in enumerate(("Q3_K", "Q8_0"))
    )
    report = report_with(Allocation(units, 4096, 5.0, None, 0.0091, 4.9))

    found = allocation_table(report)

    assert found is not None
    assert found.schemes == ("Q3_K", "Q4_K", "Q8_0")
    assert found.sentences[0].startswith("Each of 2 layers was quantized alone")
    assert "each step to a larger type" in found.sentences[2]
    ((_, cells),) = found.map_rows
    assert [cell and cell.bits for cell in cells] == ["3.4", "8.5"]
    assert "Why each layer has its type" in render_html(report)
    assert "Why each layer has its type" in render_markdown(report)


def report_with(allocation: Allocation | None) -> Report:
    return replace(make_report("PASS"), allocation=allocation)


def test_without_a_choice_there_is_no_section() -> None:
    """Most reports have none."""
    report = report_with(None)

    assert allocation_table(report) is None
    assert allocation_line(report) is None
    assert "Why each layer" not in render_html(report)
    assert "Why each layer" not in render_markdown(report)


def test_sentences_say_how_what_and_what_came_of_it() -> None:
    """Tokens, target, counts, the price of a step, predicted beside measured."""
    found = allocation_table(report_with(make_allocation()))

    assert found is not None
    how, what, price, outcome = found.sentences
    assert "4 units" in how
    assert "4,096 calibration tokens" in how
    assert "within 6.6 bits per weight" in what
    assert "2 x w4a16, 1 x w8a16, 1 x none, 6.587 bits per weight" in what
    # Taken: 0.00398 a MB for attention, 0.0001 / 2 for down_proj. Left: 0.0004975 a MB.
    assert "at least 5.0e-05 nats a MB, and the best one left out would avoid 0.00050" in price
    assert "0.000920 nats per token; the gate measured 0.0123" in outcome


def test_a_limit_on_the_divergence_is_named_as_such() -> None:
    """And an artifact that nobody judged has no measured value."""
    report = replace(make_report("UNJUDGED"), allocation=make_allocation(max_kl=0.01))
    report = replace(report, allocation=make_allocation(target_bits=None, max_kl=0.01))

    found = allocation_table(report)

    assert found is not None
    assert "predicted divergence of at most 0.01" in found.sentences[1]
    assert "was not judged" in found.sentences[-1]
    assert allocation_line(report) == "2 x w4a16, 1 x w8a16, 1 x none; predicted KL 0.000920"


def test_rows_say_what_a_scheme_avoids_and_what_the_next_would() -> None:
    """In the order of the forward, with the cost of every candidate."""
    found = allocation_table(report_with(make_allocation()))

    assert found is not None
    assert found.schemes == ("w4a16", "w8a16", "none")
    first, second, third, _ = found.rows
    assert first.name == "model.layers.0.self_attn: q_proj, k_proj, v_proj"
    assert first.costs == ("0.00400", "2.00e-05", "0")
    assert first.why == (
        "avoids 0.00398 over w4a16, 0.0040 a MB; none would avoid 2.00e-05, 1.0e-05 a MB"
    )
    assert second.why == "avoids 0.000100 over w8a16, 5.0e-05 a MB"
    assert third.why == "w8a16 would avoid 0.000498, 0.00050 a MB"


def test_a_unit_with_one_candidate_says_so() -> None:
    """Nothing was chosen there."""
    cost = UnitCost("none", 0.0, 10)
    allocation = replace(
        make_allocation(), units=(AllocatedUnit(("a.layers.0.b",), (cost,), "none"),)
    )

    found = allocation_table(report_with(allocation))

    assert found is not None
    assert found.rows[0].why == "no other candidate fits"
    assert len(found.sentences) == 3


def test_the_map_has_a_row_a_kind_and_a_cell_a_block() -> None:
    """Darker cells have more bits."""
    found = allocation_table(report_with(make_allocation()))

    assert found is not None
    assert found.blocks == (0, 1)
    assert [
        (kind, [(cell.bits, cell.tone) for cell in cells if cell]) for kind, cells in found.map_rows
    ] == [
        ("self_attn: q_proj, k_proj, v_proj", [("8", 1), ("4", 0)]),
        ("mlp.down_proj", [("16", 2), ("4", 0)]),
    ]


def test_both_renderers_show_the_section() -> None:
    """With every row."""
    report = report_with(make_allocation())
    page, text = render_html(report), render_markdown(report)

    assert '<h2 id="allocation">Why each layer has its scheme</h2>' in page
    assert page.count("KL with w8a16") == 1
    assert "### Why each layer has its scheme" in text
    assert "`model.layers.0.self_attn: q_proj, k_proj, v_proj`" in text
    assert text.count("would avoid") == 4


def test_names_from_a_checkpoint_cannot_break_out() -> None:
    """Layers are named by strangers."""
    hostile = AllocatedUnit(("model.layers.0.<script>|`x`",), (UnitCost("none", 0.0, 1),), "none")
    report = report_with(replace(make_allocation(), units=(hostile,)))

    assert "<script>|" not in render_html(report)
    assert "<script>|" not in render_markdown(report)


def test_layers_of_different_parents_are_named_in_full() -> None:
    """Only what they share is said once."""
    unit = AllocatedUnit(("a.b.c", "a.d.c"), (), "none")

    assert name_unit(unit) == "a.b.c, a.d.c"
