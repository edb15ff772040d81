"""What went, or would go, to a repository on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublishedFile:
    """One file of a publication; it has either a place on this disk or a content made for it."""

    path: str
    """In the repository."""
    size_bytes: int
    sha256: str
    large: bool
    """Whether it goes through large file storage (LFS), as far as the Hub's rules are known."""
    present: bool = False
    """Whether the revision has exactly this file already, so that nothing of it is sent."""
    source: Path | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class Publication:
    """What `quantkit.publish` returns: what a repository has now, or would have."""

    repo: str
    revision: str
    """The branch; of a pull request the one that it is for."""
    files: tuple[PublishedFile, ...]
    deleted: tuple[str, ...]
    """Files of an earlier publication that the commit removes."""
    url: str
    serve: str
    """The command that runs what was published."""
    private: bool | None
    """None where the repository was not looked at."""
    commit: str | None = None
    """None of a dry run."""
    pull_request: str | None = None
    """Its address."""
    tag: str | None = None
    alias: str | None = None
    moved_from: str | None = None
    """The commit that the alias named before; None where it is new or did not move."""
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def sent_bytes(self) -> int:
        """Bytes of the files that the revision did not have."""
        return sum(file.size_bytes for file in self.files if not file.present)


@dataclass(frozen=True)
class Promotion:
    """What a moving name of a repository meant before, and means now."""

    repo: str
    alias: str
    kind: str
    """`tag` or `branch`."""
    before: str | None
    """The commit; None where the name is new."""
    after: str
    format: str
    """Of the artifact that is served: the one at the root, else the first."""
    folder: str
    """Of that artifact in the repository; empty for the root."""
    url: str
    serve: str
    dry_run: bool = False
