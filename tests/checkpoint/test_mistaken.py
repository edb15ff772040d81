"""Files that are something else than their names say, as downloads and copies leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.calibration.sources import read_text
from quantkit.calibration.tokenizer import read_json_object
from quantkit.checkpoint.headers import read_header, read_json
from quantkit.checkpoint.mistaken import recognise
from quantkit.checkpoint.source import find_folder
from quantkit.errors import QuantkitError
from quantkit.formats.gguf.container import open_gguf

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 275336\n"


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (POINTER, "git lfs pull"),
        (b"<!DOCTYPE html>\n<html lang='en'>", "web page"),
        (b"\xef\xbb\xbf\n <HTML>", "web page"),
        (b"", "empty"),
        (b" \n", "empty"),
    ],
)
def test_usual_accidents_are_known(head: bytes, words: str) -> None:
    """Each with what mends it."""
    assert words in str(recognise(head))


@pytest.mark.parametrize("head", [b"{", b"GGUF\x03", b"\x10\0\0\0\0\0\0\0{}", b"version: 1"])
def test_other_files_are_not_guessed_at(head: bytes) -> None:
    """Their readers know better what is wrong."""
    assert recognise(head) is None


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", read_header),
        ("config.json", read_json),
        ("tokenizer.json", read_json_object),
        ("model.gguf", open_gguf),
        ("texts.txt", read_text),
    ],
)
def test_every_reader_says_that_git_lfs_has_not_run(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    """A pointer is what `git clone` brings in place of a large file."""
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(QuantkitError, match=rf"{name}.*Git LFS pointer.*git lfs pull"):
        read(tmp_path / name)


def test_a_folder_that_is_called_nearly_so_is_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever level of the path the slip is; and where it was looked for is said."""
    (tmp_path / "models" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for wrong, near in [("./modles/small", "models"), ("models/smal/", "models/small")]:
        with pytest.raises(QuantkitError, match=rf"folder in .*did you mean '{near}'\?$"):
            find_folder(wrong)
    with pytest.raises(QuantkitError, match=r"no such folder$"):
        find_folder("/nowhere/at/all")
