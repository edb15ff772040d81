"""What a repository holds: its files, and which of them quantkit has published earlier."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit.checkpoint.headers import MAX_HEADER_BYTES, read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CheckpointError, PublishError
from quantkit.publishing.checking import CARD, EVIDENCE, REPORT, list_artifacts
from quantkit.publishing.client import Hub, ask
from quantkit.publishing.request import MAIN
from quantkit.records import Report
from quantkit.report.model_card import read_carried_front_matter
from quantkit.report.reading import read_report

REPORTS = ("report.json", "report.md", "report.html", "junit.xml")
IGNORED = ".gitignore"
"""The Hub leaves out of a commit what such a file in the repository names."""

_ATTRIBUTES = ".gitattributes"
_FOR_PEOPLE = frozenset(
    {".md", ".txt", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".cff", ".bib"}
)
_TERMS = ("license", "notice", "use_policy")
_MOST_NAMED = 5


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision."""

    path: str
    size_bytes: int
    blob: str
    """Git's name of its content, or of the pointer to it."""
    sha256: str | None
    """Of a large file."""


@dataclass(frozen=True)
class Earlier:
    """What quantkit has published before, at the root or in a folder of a repository."""

    folder: str
    """Empty for the root."""
    evidence: Mapping[str, Any]
    document: Mapping[str, Any]
    """Of its report.json."""
    report: Report
    owned: frozenset[str]
    """Paths of its files, in the repository."""
    hashes: Mapping[str, str]
    """Path in the repository -> sha256, of the files that were judged."""
    carried: Mapping[str, Any]
    """Front matter of the original's card."""

    @property
    def base(self) -> str | None:
        """The Hub id of the original; None for a folder."""
        return find_base(self.evidence)


@dataclass(frozen=True)
class Contents:
    """A repository as it is; all empty where it does not exist yet."""

    exists: bool = False
    private: bool | None = None
    head: str | None = None
    """Commit that `files` are of."""
    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    """Name -> commit."""
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    earlier: tuple[Earlier, ...] = ()


def find_base(evidence: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the original that evidence names; None for a folder."""
    model = evidence.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("revision"), str):
        return None
    return str(model.get("name", "")).partition("@")[0]


def look(hub: Hub, repo: str, revision: str, *, or_main: bool = True) -> Contents:
    """Return what a repository has at a branch, a tag or a commit.

    Args:
        or_main: look at the main branch where there is no such revision.

    Raises:
        PublishError, HubError: the Hub does not say.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    what = f"look at {repo}"

    def describe() -> Any:
        try:
            return hub.api.repo_info(repo)
        except RepositoryNotFoundError as error:
            # Without a valid token this is the answer for everything that is private.
            if error.response.status_code == 401:
                raise
            return None

    info = ask(hub, what, repo, describe)
    if info is None:
        return Contents()
    refs = ask(hub, what, repo, lambda: hub.api.list_repo_refs(repo))
    branches = {each.name: each.target_commit for each in refs.branches}
    tags = {each.name: each.target_commit for each in refs.tags}
    head = branches.get(revision) or tags.get(revision)
    if head is None and or_main:
        head = branches.get(MAIN) or info.sha
    if head is None:
        found = ask(hub, what, repo, lambda: hub.api.repo_info(repo, revision=revision))
        head = str(found.sha)
    files = list_files(hub, repo, head)
    return Contents(
        exists=True,
        private=bool(info.private),
        head=head,
        branches=branches,
        tags=tags,
        files=files,
        earlier=tuple(find_earlier(hub, repo, head, files)),
    )


def list_files(hub: Hub, repo: str, commit: str) -> dict[str, RemoteFile]:
    """Return the files of a commit by path.

    Raises:
        PublishError, HubError: the Hub does not say.
    """
    from huggingface_hub.hf_api import RepoFile

    def read() -> dict[str, RemoteFile]:
        tree = hub.api.list_repo_tree(repo, recursive=True, revision=commit)
        return {
            each.path: RemoteFile(
                each.path, each.size, each.blob_id, each.lfs.sha256 if each.lfs else None
            )
            for each in tree
            if isinstance(each, RepoFile)
        }

    return ask(hub, f"look at {repo}", repo, read)


def fetch_file(hub: Hub, repo: str, commit: str, file: RemoteFile, folder: Path) -> Path:
    """Bring a small file of a commit into `folder`.

    Raises:
        PublishError, HubError: it cannot be read, or its name leads out of the folder.
    """
    try:
        join_inside(folder, file.path)
    except CheckpointError as error:
        raise PublishError(f"{repo} has a file that is refused: {error}") from None
    return Path(
        ask(
            hub,
            f"read {file.path} of {repo}",
            repo,
            lambda: hub.api.hf_hub_download(repo, file.path, revision=commit, local_dir=folder),
        )
    )


def find_earlier(
    hub: Hub, repo: str, commit: str, files: Mapping[str, RemoteFile]
) -> Iterator[Earlier]:
    """Yield what the evidence in a repository speaks of: at the root, or in a folder of it."""
    # The root's first: names without a folder are shorter.
    for path in sorted(files, key=lambda path: (path.count("/"), path)):
        folder, _, name = path.rpartition("/")
        if name == EVIDENCE and "/" not in folder:
            with tempfile.TemporaryDirectory() as scratch:
                found = _read_earlier(hub, repo, commit, files, folder, Path(scratch))
            if found is not None:
                yield found


def _read_earlier(
    hub: Hub,
    repo: str,
    commit: str,
    files: Mapping[str, RemoteFile],
    folder: str,
    scratch: Path,
) -> Earlier | None:
    """Return what the evidence in `folder` speaks of; None where it is not quantkit's.

    Raises:
        PublishError, HubError: it cannot be fetched.
    """
    begin = f"{folder}/" if folder else ""
    wanted = [files.get(f"{begin}{name}") for name in (EVIDENCE, REPORT)]
    if not all(file is not None and file.size_bytes <= MAX_HEADER_BYTES for file in wanted):
        return None
    places = [fetch_file(hub, repo, commit, file, scratch) for file in wanted if file is not None]
    try:
        evidence, document = map(read_json, places)
        rows = list_artifacts(evidence, f"{begin}{EVIDENCE} of {repo}")
        report = read_report(document)
    except (CheckpointError, PublishError, ValueError):
        return None
    hashes = {
        _join(begin, row["path"], name): digest
        for row in rows
        for name, digest in row["files"].items()
    }
    cards = {_join(begin, row["path"], CARD) for row in rows} | {f"{begin}{CARD}"}
    written = {f"{begin}report/{name}" for name in REPORTS} | {f"{begin}{EVIDENCE}"}
    card = next((files[path] for path in sorted(cards, key=len) if path in files), None)
    carried: Mapping[str, Any] = MappingProxyType({})
    if card is not None and card.size_bytes <= MAX_HEADER_BYTES:
        carried = read_carried_front_matter(fetch_file(hub, repo, commit, card, scratch))
    owned = frozenset((set(hashes) | cards | written) & set(files))
    return Earlier(folder, evidence, document, report, owned, hashes, carried)


def _join(begin: str, path: str, name: str) -> str:
    return f"{begin}{name}" if path == "." else f"{begin}{path}/{name}"


def find_deletions(
    contents: Contents,
    new: Iterable[str],
    folder: str,
    base: str | None,
    *,
    replace: bool,
    where: str,
) -> tuple[str, ...]:
    """Return which files a publication into `folder` removes: those of the one before it there.

    Files for people (pictures, licences, texts) stay in any case, and so do other variants.

    Args:
        contents: of the repository.
        new: paths that the publication writes.
        folder: of the variant; empty for the root.
        base: Hub id of the original, where it has one.
        replace: remove whatever else there is, too.
        where: name of the repository, for errors.

    Raises:
        PublishError: there is something else, and nobody has said that it may go.
    """
    others = {
        each.folder: each.base
        for each in contents.earlier
        if base is not None and each.base not in (None, base)
    }
    kept = {
        path
        for each in contents.earlier
        for path in each.owned
        if each.folder != folder and each.folder not in others
    }
    before = {path for each in contents.earlier if each.folder == folder for path in each.owned}
    foreign = {path for each in contents.earlier if each.folder in others for path in each.owned}
    strangers = sorted(
        path
        for path in contents.files
        if path not in kept and path not in before and not _is_for_people(path)
    )
    clash = sorted((set(new) & kept) - {CARD})
    if clash:
        raise PublishError(
            f"{where} has {_name(clash)} of another variant already: take another --variant"
        )
    if IGNORED in contents.files:
        raise PublishError(
            f"{where} has a {IGNORED}, by which the Hub could leave files out of a commit: delete "
            f"it first"
        )
    if others and not replace:
        folder_of, other = next(iter(others.items()))
        raise PublishError(
            f"{where} holds a quantized {other}{f' in {folder_of}' if folder_of else ''}, and this "
            f"is one of {base}: take another repository, or pass --replace to remove what is there"
        )
    beside = [path for path in strangers if path not in foreign]
    if beside and not replace:
        raise PublishError(
            f"{where} holds files that quantkit did not publish there and that would lie beside "
            f"the artifact: {_name(beside)}; take another repository, or pass --replace to remove "
            f"them in the same commit"
        )
    gone = before | set(strangers)
    return tuple(sorted(path for path in gone if path not in set(new) | kept))


def _is_for_people(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    known = Path(name).suffix in _FOR_PEOPLE or name.startswith(_TERMS)
    return known or path == _ATTRIBUTES


def _name(paths: list[str]) -> str:
    more = len(paths) - _MOST_NAMED
    return ", ".join(paths[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
