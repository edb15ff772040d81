"""What a file that is not what its name says is instead: mistakes of copying and downloading."""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 512
"""As much as `recognise` looks at; a Git LFS pointer is never longer than 1024 bytes."""

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a pointer begins: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md"""
_PAGES = (b"<!doctype html", b"<html", b"<?xml")
"""How the pages begin that a site answers with: a log-in, or the view of a file."""


def recognise(head: bytes) -> str | None:
    """Say what a file is that begins with `head` and how to get the right one; None if unknown."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if start.startswith(POINTER):
        return (
            "it is a Git LFS pointer, in place of the file: run `git lfs install` and "
            "`git lfs pull` in that folder"
        )
    if start.startswith(_PAGES):
        return "it is a web page, in place of the file: download it with `hf download`"
    if not start:
        return "it is empty: download or copy it again"
    return None


def recognise_file(path: Path) -> str | None:
    """Say it of a file, as `recognise` does; None where it cannot be read."""
    try:
        with path.open("rb") as handle:
            return recognise(handle.read(HEAD_BYTES))
    except OSError:
        return None
