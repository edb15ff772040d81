"""An output appears whole, and what quantkit did not write stays where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.staging import check_output, commit, partial_of


def make_partial(output: Path) -> Path:
    """A job's folder that is ready to become `output`."""
    partial = partial_of(output)
    partial.mkdir()
    (partial / "lock").write_text("")
    (partial / "new").write_text("new")
    return partial


def test_a_strangers_folder_is_never_filled(tmp_path: Path) -> None:
    """A job would discard it or rename it; a folder that a job left is gone on with."""
    output = tmp_path / "out"
    partial = partial_of(output)
    partial.mkdir()
    check_output(output, overwrite=False)
    (partial / "thesis.tex").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"out\.partial is in the way"):
            check_output(output, overwrite=overwrite)
    (partial / "lock").write_text("")
    check_output(output, overwrite=False)


def test_a_link_in_place_of_the_folder_to_be_filled_is_refused(tmp_path: Path) -> None:
    """What it points to would be filled and then forgotten."""
    (tmp_path / "elsewhere").mkdir()
    partial_of(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is in the way"):
        check_output(tmp_path / "out", overwrite=False)


def test_replacing_an_output_touches_nothing_beside_it(tmp_path: Path) -> None:
    """Whatever it is called."""
    output = tmp_path / "out"
    for folder in (output, tmp_path / "out.replaced"):
        folder.mkdir()
        (folder / "old").write_text("old")

    commit(make_partial(output), output)

    assert sorted(path.name for path in output.iterdir()) == ["new"]
    assert (tmp_path / "out.replaced" / "old").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]


def test_the_old_output_stays_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    """The rename fails here because its source was moved aside with the output."""
    output = tmp_path / "out"
    partial = output / "inside.partial"
    partial.mkdir(parents=True)
    (output / "old").write_text("old")

    with pytest.raises(OutputError, match="cannot write"):
        commit(partial, output)

    assert (output / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
