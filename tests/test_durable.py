"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import quantkit.durable
from quantkit.durable import exchange, make_folder, sync, write_atomically, write_text
from quantkit.errors import OutputError, ResourceError
from quantkit.staging import commit


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

    with pytest.raises(ResourceError, match="Input/output error"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """The error says which file could not be written."""
    with pytest.raises(OutputError, match=r"absent/a\.json"):
        write_text(tmp_path / "absent" / "a.json", "x")


def test_a_file_system_need_not_sync_folders() -> None:
    """As /proc cannot; what else goes wrong is an error."""
    sync(Path("/proc"))
    with pytest.raises(OSError):
        sync(Path("/proc/absent"))


def test_a_folder_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power that goes after the rename takes nothing back: every file and folder was synced."""
    partial, output = tmp_path / "out.partial", tmp_path / "out"
    for name in ("lock", "a/b/deep", "a/file", "c/empty"):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(b"" if name == "c/empty" else b"x")
    (partial / "link").symlink_to("/dev/null")
    expected = {
        path.stat().st_ino for path in (partial, *partial.rglob("*")) if path.name != "link"
    }
    synced: list[int] = []
    renamed: list[int] = []
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        renamed.extend(synced)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", note_rename)
    commit(partial, output, overwrite=True)

    assert set(renamed) == expected
    # Names before the folders that hold them, and the new name after the rename.
    assert renamed[-1] == output.stat().st_ino
    assert tmp_path.stat().st_ino in synced[len(renamed) :]


def test_missing_folders_are_made_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder above holds the name: it is synced for each that is made."""
    synced: list[Path] = []
    monkeypatch.setattr(quantkit.durable, "sync", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


def test_two_folders_change_names_in_one_step(tmp_path: Path) -> None:
    """Or nothing happens where the system has no such step, and the caller is told."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").is_file()
        assert (tmp_path / "b" / "a").is_file()
        with pytest.raises(FileNotFoundError):
            exchange(tmp_path / "a", tmp_path / "absent")
    else:
        assert (tmp_path / "a" / "a").is_file()
