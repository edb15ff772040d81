"""What a publication looks like: lines for people, a document for programs."""

from __future__ import annotations

from typing import Any

from quantkit.cli.layout import Cell, Line, Sentence, make_table
from quantkit.records import Publication, PublishedFile
from quantkit.report.rounding import format_bytes, format_count

_SHORT = 12
"""Letters of a commit that tell it from others."""


def publication_document(found: Publication) -> dict[str, Any]:
    """What programs read of a publication, or of a dry run."""
    return {
        "repo": found.repo,
        "revision": found.revision,
        "commit": found.commit,
        "url": found.url,
        "pull_request": found.pull_request,
        "private": found.private,
        "tag": found.tag,
        "alias": found.alias,
        "moved_from": found.moved_from,
        "files": [_file_document(file) for file in found.files],
        "deleted": list(found.deleted),
        "sent_files": sum(not file.present for file in found.files),
        "sent_bytes": found.sent_bytes,
        "notes": list(found.notes),
        "serve": found.serve,
        "dry_run": found.dry_run,
    }


def _file_document(file: PublishedFile) -> dict[str, Any]:
    return {
        "path": file.path,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
        "large": file.large,
        "present": file.present,
    }


def list_publication_lines(found: Publication) -> list[Line]:
    """What people see of a publication, or of a dry run."""
    lines: list[Line] = []
    if found.dry_run:
        rows: list[list[str | Cell]] = [
            [Cell(file.path, whole=True), format_bytes(file.size_bytes), _say_how(file)]
            for file in found.files
        ]
        rows += [[Cell(path, whole=True), "", "is removed"] for path in found.deleted]
        lines += [make_table(rows), ""]
    lines += [Sentence("note     ", note) for note in found.notes]
    new = [file for file in found.files if not file.present]
    sent = f"{format_count(len(new), 'file')}, {format_bytes(found.sent_bytes)}"
    there = len(found.files) - len(new)
    more = f"; {there} there already" if there else ""
    more += f"; {len(found.deleted)} removed" if found.deleted else ""
    verb = "would go" if found.dry_run else "sent    "
    lines.append(f"{verb} {sent}{more}")
    where = f"{found.repo} ({_say_who(found.private)}), branch {found.revision}"
    lines.append(f"to       {where}")
    if found.commit is not None:
        lines.append(f"commit   {found.commit}")
    if found.tag is not None:
        lines.append(f"tag      {found.tag}")
    if found.alias is not None:
        lines.append(f"alias    {found.alias}{say_move(found.moved_from, found.commit)}")
    if found.dry_run:
        return [*lines, "nothing was sent: this was a dry run"]
    serve = [] if found.pull_request else [f"serve    {found.serve}"]
    return [*lines, f"url      {found.url}", *serve]


def _say_how(file: PublishedFile) -> str:
    kind = "large file (LFS)" if file.large else "in the commit"
    return f"{kind}, there already" if file.present else kind


def _say_who(private: bool | None) -> str:
    if private is None:
        return "not looked at"
    return "private" if private else "public"


def say_move(before: str | None, after: str | None) -> str:
    """From which commit to which a name has moved."""
    if after is None:
        return ""
    if before == after:
        return f"  stays at {after[:_SHORT]}"
    return f"  {before[:_SHORT] if before else 'new'} → {after[:_SHORT]}"
