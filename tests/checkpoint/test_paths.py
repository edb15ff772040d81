from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CheckpointError


@pytest.mark.parametrize("name", ["model.safetensors", "templates/rag.jinja", "a..b", "./x"])
def test_names_inside_are_joined(tmp_path: Path, name: str) -> None:
    """Plain names and subfolders pass, whether the file exists or not."""
    assert join_inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "C:/x",
        "c:x",
        "..\\x",
        "a\\b",
        "x\0y",
        "NUL",
        "com1.safetensors",
        "sub/aux",
        "LPT².json",
        "con .txt",
        "./",
        "a\nb",
        "a\u202eb",
        "a\udc80",
        "file:///x",
        "a:b",
        "~/x",
        "a.",
        "a /b",
        ".. /b",
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    """Absolute, climbing, drive, NUL and device names raise and are shown."""
    with pytest.raises(CheckpointError) as caught:
        join_inside(tmp_path, name)

    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["n" * 256, "é" * 128, "n/" * 2100 + "x"])
def test_names_that_are_too_long_are_cut_in_the_message(tmp_path: Path, name: str) -> None:
    """They are measured in bytes."""
    with pytest.raises(CheckpointError, match="longer than names of files are") as caught:
        join_inside(tmp_path, name)

    assert len(str(caught.value)) < len(str(tmp_path)) + 250


def test_what_keeps_a_reader_waiting_is_refused(tmp_path: Path) -> None:
    """A pipe that nobody writes to, also behind a link."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(CheckpointError, match="is a pipe, a socket or a device"):
            join_inside(tmp_path, name)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A link is followed before it is trusted, also one that is a folder on the way."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret").write_text("x")
    (inside / "file").symlink_to(outside / "secret")
    (inside / "folder").symlink_to(outside)

    for name in ("file", "folder/secret"):
        with pytest.raises(CheckpointError, match="outside of the checkpoint"):
            join_inside(inside, name)


def test_a_link_within_the_folder_is_fine(tmp_path: Path) -> None:
    """Only where a link ends matters."""
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")

    assert join_inside(tmp_path, "link").read_text() == "x"


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    """A circle of links has no end to look at."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "c").symlink_to(tmp_path / "a")

    with pytest.raises(CheckpointError):
        join_inside(folder, "c")


def test_a_hub_snapshot_may_link_to_the_blobs_of_its_repository_only(tmp_path: Path) -> None:
    """The Hub's cache keeps files as links to ../../blobs/<hash>."""
    blobs, snapshot = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/abc"
    other = tmp_path / "other/blobs"
    for folder in (blobs, snapshot, other):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("x")
    (other / "2").write_text("y")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "stolen.json").symlink_to("../../../other/blobs/2")

    assert join_inside(snapshot, "config.json").read_text() == "x"
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        join_inside(snapshot, "stolen.json")
