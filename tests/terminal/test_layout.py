"""How replies are laid out where there is little room."""

from __future__ import annotations

import pytest

from quantkit.cli.layout import Cell, Line, Sentence, lay_out, make_table

PATH = "/a/folder with spaces/and/a/name/that/is/longer/than/any/line/out"


def show(line: Line, width: int | None) -> list[str]:
    """The lines that something takes, without styles."""
    return ["".join(text for text, _ in spans).rstrip() for spans in lay_out(line, width)]


def test_a_sentence_goes_on_below_where_it_began() -> None:
    """Between words; what is quoted as code is one."""
    line = Sentence("note     ", "read it with `quantkit plan --recipe x`, then go on")

    assert show(line, 40) == [
        "note     read it with",
        "         `quantkit plan --recipe x`,",
        "         then go on",
    ]
    assert show(line, None) == ["note     read it with `quantkit plan --recipe x`, then go on"]


def test_a_number_stays_with_its_unit() -> None:
    """At any width; other words go on in the next line."""
    line = Sentence("time  ", "prepare 3 s, solve 12 min 5 s, gate 34 s, 1.5 GB at 7 samples")

    for width in range(22, 70):
        rows = show(line, width)
        assert (
            " ".join(" ".join(rows).split()) == "time prepare 3 s, solve 12 min 5 s, gate 34 "
            "s, 1.5 GB at 7 samples"
        )
        assert not any(row.split()[0] in ("s", "s,", "min", "GB") for row in rows)
    assert any(row.endswith(" 7") for width in range(22, 70) for row in show(line, width))


def test_a_sentence_begins_behind_its_mark() -> None:
    """The verdict, in its colour."""
    line = Sentence("verdict  ", "every limit holds", Cell("PASS", "green"))

    assert show(line, 30) == ["verdict  PASS  every limit", "         holds"]
    assert next(lay_out(line, 30))[1] == ("PASS", "green")


@pytest.mark.parametrize("width", [20, 60])
def test_what_is_to_be_copied_is_in_one_line(width: int) -> None:
    """A path with spaces too, as a line or as a cell; a terminal wraps it without an end."""
    assert show(f"report   {PATH}", width) == [f"report   {PATH}"]
    assert PATH in show(make_table([("folder", Cell(PATH, whole=True))]), width)[-1]
    assert PATH.replace(" ", "_") in show(Sentence("", f"see {PATH.replace(' ', '_')}"), width)[-1]


def test_columns_get_narrower_between_words() -> None:
    """As long as there is room for each word."""
    table = make_table([("what", "size"), ("all of it", "12 kB")], has_titles=True)

    assert show(table, 80) == ["what       size", "all of it  12 kB"]
    assert show(table, 14) == ["what     size", "all of   12 kB", "it"]


def test_rows_become_lists_where_names_would_be_cut() -> None:
    """Their names stay whole, and each figure has its title; empty cells are left out."""
    name = "model.layers.0.self_attn.v_proj"
    table = make_table([("layer", "KL then", "adds"), (name, "0.0186", "")], has_titles=True)

    assert show(table, 36) == [name, "  KL then  0.0186"]


def test_rows_without_titles_stay_under_each_other() -> None:
    """Below their name."""
    rows = [("onnxruntime", "version", "1.32.0"), ("", "loads", Cell("x" * 40, whole=True))]

    assert show(make_table(rows), 52) == [
        "onnxruntime",
        "  version  1.32.0",
        f"  loads    {'x' * 40}",
    ]


def test_figures_are_aligned_at_their_right() -> None:
    """So that their sizes can be seen."""
    table = make_table([("job", "KL"), ("a", "0.0123"), ("b", "1")], figures_from=1)

    assert show(table, 80) == ["job      KL", "a    0.0123", "b         1"]


def test_wide_letters_take_two_columns() -> None:
    """As they do on a terminal."""
    assert show(make_table([("模型", "a"), ("x", "b")]), 80) == ["模型  a", "x     b"]
    assert show(Sentence("", "模型 模型 模型"), 16) == ["模型 模型 模型"]
    assert show(Sentence("", "模型模型 模型模型"), 16) == ["模型模型", "模型模型"]


@pytest.mark.parametrize("evil", ["\x1b[2J", "\u202e", "\x9b31m", "\x07", "\ue000\u2066"])
def test_nothing_gets_through_that_a_terminal_acts_upon(evil: str) -> None:
    """In lines, sentences, marks and cells; markup and names of emoji stay what they are."""
    text = f"{evil}[red]x[/red]:car:"
    lines: list[Line] = [
        text,
        Sentence(text, text, Cell(text)),
        make_table([(text, Cell(text, whole=True)), (text, text)]),
        make_table([(text, text, text), (text, text, text)], has_titles=True),
    ]
    for line in lines:
        for width in (20, 60, None):
            shown = show(line, width)
            assert all(row.isprintable() for row in shown)
            assert "[red]x[/red]:car:" in "".join(shown)
