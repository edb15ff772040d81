"""Repositories in memory: files, commits, branches, tags, pull requests and large objects."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from tests.hub.answers import refuse

MAIN = "refs/heads/main"
DATE = "2026-01-01T00:00:00.000Z"
REGULAR_BYTES = 10 * 1024**2
"""The Hub takes files of up to this size into a commit itself; larger ones are LFS objects."""

GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        *("*.7z", "*.arrow", "*.bin", "*.gz", "*.h5", "*.model", "*.msgpack", "*.npy", "*.npz"),
        *("*.onnx", "*.parquet", "*.pt", "*.pth", "*.safetensors", "saved_model/**/*", "*.tar"),
        *("*.zip", "*.zst", "*tfevents*"),
    )
).encode()
"""The rules that a new repository starts with; .gguf is not among them, as on the Hub."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """The name of an LFS object."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git itself stores of an LFS file."""
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @cached_property
    def oid(self) -> str:
        """Git's name of the blob: of the content, or of the pointer to it."""
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a repository; `files` by path."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    files: Mapping[str, StoredFile]


@dataclass(frozen=True)
class PullRequest:
    """A pull request; its branch is refs/pr/<number>."""

    number: int
    title: str
    description: str
    author: str

    @property
    def ref(self) -> str:
        """The full name of its branch."""
        return f"refs/pr/{self.number}"


@dataclass
class Repo:
    """One model repository."""

    id: str
    private: bool = False
    gated: bool = False
    accepted: set[str] = field(default_factory=set)
    """Users who may read a gated repository."""
    refs: dict[str, str] = field(default_factory=dict)
    """Commit by the full name of a branch, tag or pull request."""
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Contents of large files by sha256, whether a commit names them or not."""

    @property
    def owner(self) -> str:
        """The user or organization before the slash."""
        return self.id.partition("/")[0]

    def find(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag, a full ref or a commit's own name."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise refuse(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def branch(self, revision: str) -> str:
        """Return the full name of a branch or pull request that can be committed to."""
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs or ref.startswith("refs/tags/"):
            raise refuse(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return ref

    def commit(
        self,
        ref: str,
        files: Mapping[str, StoredFile],
        *,
        title: str,
        author: str,
        description: str = "",
        parent: str | None = None,
    ) -> Commit:
        """Add a commit with exactly `files` and move `ref` to it, at once."""
        parent = parent or self.refs.get(ref)
        listing = "".join(f"{path}\0{files[path].oid}\n" for path in sorted(files))
        named = f"{self.id}\n{parent}\n{title}\n{len(self.commits)}\n{listing}"
        oid = hashlib.sha1(named.encode()).hexdigest()
        kept = MappingProxyType(dict(files))
        commit = Commit(oid, parent, title, description, author, kept)
        self.commits[oid] = commit
        self.refs[ref] = oid
        return commit

    def history(self, commit: Commit) -> Iterator[Commit]:
        """Yield a commit and its ancestors, newest first."""
        found: Commit | None = commit
        while found is not None:
            yield found
            found = self.commits[found.parent] if found.parent else None

    def stores_as_lfs(self, commit: Commit, path: str, size: int, sample: bytes) -> bool:
        """Whether a file goes to the large object storage: by its name, its size, or its bytes."""
        attributes = commit.files.get(".gitattributes", StoredFile(b"")).content.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        name = path.rpartition("/")[2]
        named = any(fnmatch.fnmatch(name, each) or fnmatch.fnmatch(path, each) for each in patterns)
        return named or size > REGULAR_BYTES or b"\0" in sample


def make_repo(
    id: str,
    files: Mapping[str, bytes],
    *,
    author: str,
    private: bool = False,
    gated: bool = False,
) -> Repo:
    """Return a new repository: the Hub's first commit, and another one where there are files."""
    repo = Repo(id, private=private, gated=gated)
    first = {".gitattributes": StoredFile(GIT_ATTRIBUTES)}
    commit = repo.commit(MAIN, first, title="initial commit", author=author)
    if files:
        added = {
            path: StoredFile(content, repo.stores_as_lfs(commit, path, len(content), content[:512]))
            for path, content in files.items()
        }
        repo.objects.update({file.sha256: file.content for file in added.values() if file.lfs})
        repo.commit(MAIN, {**first, **added}, title="Upload files", author=author)
    return repo
