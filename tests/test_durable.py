"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.durable import write_atomically, write_text
from quantkit.errors import OutputError


def test_text_replaces_a_file(tmp_path: Path) -> None:
    """The new text is there and nothing else."""
    path = tmp_path / "a.json"
    path.write_text("old")

    write_text(path, "new ü\n")

    assert path.read_text(encoding="utf-8") == "new ü\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    """Neither a half-written file nor the file beside it remains."""
    path = tmp_path / "a.bin"
    path.write_text("old")

    def write(beside: Path) -> None:
        beside.write_bytes(b"half")
        raise OSError(5, "Input/output error")

    with pytest.raises(OutputError, match="Input/output error"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """The error says which file could not be written."""
    with pytest.raises(OutputError, match=r"absent/a\.json"):
        write_text(tmp_path / "absent" / "a.json", "x")
